// Work shared among threads as they come free. A core that something else slows down, as happens on every shared
// machine, then gets less of it instead of letting the others wait. For drivers only, see gated_aggregation.h.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace focalnet::cpu {

// Calls `run(next)` once in each thread; `next()` gives the number of a task nobody has taken, from 0, or one that is
// not below `tasks` when all are. Who does a task must not matter to its result.
template <typename Run>
void share_out(int64_t tasks, const Run& run) {
    std::atomic<int64_t> taken{0};
    const auto next = [&taken] { return taken.fetch_add(1, std::memory_order_relaxed); };
    const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) run(next);
    });
}

}  // namespace focalnet::cpu
