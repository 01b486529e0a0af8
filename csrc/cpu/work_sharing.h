// Sharing of work among threads that take it as they become free. A core that other processes slow down takes less of
// it, and the other threads need not wait. For drivers only, see gated_aggregation.h.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "threads.h"

namespace focalnet::cpu {

// Units of work [begin, end).
struct Range {
    int64_t begin, end;
    bool empty() const { return begin == end; }
};

// Calls `run(next)` once in each thread. `next()` returns a range of units that no thread has taken yet, or an empty
// one when all are taken. Ranges shrink from `most` units to `least` as the work runs out: long ranges cost little
// overhead, and short ones at the end let the threads finish together. The result of a unit must not depend on the
// thread that works on it, nor on the other units of its range.
template <typename Run>
void share_ranges(Threads who, int64_t units, int64_t least, int64_t most, const Run& run) {
    const int64_t threads = std::min((units + least - 1) / least, thread_count(who));
    std::atomic<int64_t> taken{0};
    const auto next = [&taken, units, least, most, threads] {
        int64_t begin = taken.load(std::memory_order_relaxed), end;
        do {
            end = std::min(units, begin + std::clamp<int64_t>((units - begin) / (2 * threads), least, most));
        } while (!taken.compare_exchange_weak(begin, end, std::memory_order_relaxed));
        return Range{begin, end};
    };
    if (units > 0) on_threads(who, threads, [&] { run(next); });
}

// The same, one unit at a time. `next()` returns the index of the unit, or at least `tasks` when all are taken.
template <typename Run>
void share_out(Threads who, int64_t tasks, const Run& run) {
    share_ranges(who, tasks, 1, 1, [&](auto next) { run([&next] { return next().begin; }); });
}

// Calls `each(begin, end)` for ranges that together cover all rows. All but the last have at least `least` rows.
template <typename Each>
void share_rows(Threads who, int64_t rows, int64_t least, const Each& each) {
    share_ranges(who, rows, least, std::max(least, rows), [&](auto next) {
        for (Range range = next(); !range.empty(); range = next()) each(range.begin, range.end);
    });
}

}  // namespace focalnet::cpu
