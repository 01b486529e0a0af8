// Work that threads take as they become free. A core that other processes slow down takes less of it, and the other
// threads need not wait. For drivers only, see gated_aggregation.h.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace focalnet::cpu {

// Units of work [begin, end).
struct Range {
    int64_t begin, end;
    bool empty() const { return begin == end; }
};

// Calls `run(next)` once in each thread; `next()` gives a range of units that no thread has taken, or an empty one
// when all are taken. Ranges shrink from `most` units to `least` as less is left: long ones make the cost of a range
// itself small, short ones at the end let the threads finish together. The result of a unit must not depend on the
// thread that works on it, nor on the other units of its range.
template <typename Run>
void share_ranges(int64_t units, int64_t least, int64_t most, const Run& run) {
    const int64_t threads = std::min<int64_t>(units, torch::stable::get_num_threads());
    std::atomic<int64_t> taken{0};
    const auto next = [&taken, units, least, most, threads] {
        int64_t begin = taken.load(std::memory_order_relaxed), end;
        do {
            end = std::min(units, begin + std::clamp<int64_t>((units - begin) / (2 * threads), least, most));
        } while (!taken.compare_exchange_weak(begin, end, std::memory_order_relaxed));
        return Range{begin, end};
    };
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) run(next);
    });
}

// The same, one unit at a time: `next()` gives its number, or one that is at least `tasks` when all are taken.
template <typename Run>
void share_out(int64_t tasks, const Run& run) {
    share_ranges(tasks, 1, 1, [&](auto next) { run([&next] { return next().begin; }); });
}

}  // namespace focalnet::cpu
