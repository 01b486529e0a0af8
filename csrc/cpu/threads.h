// The threads that share work with the calling thread: PyTorch's, or the extension's own.
//
// PyTorch's (OpenMP's) threads spin for milliseconds while they wait for work or for each other. A parallel region
// ends only when every thread has taken part, even one that another process keeps off its core. The extension's
// threads sleep after kSpin. One that comes late finds the work done, and nobody waits for it. They serve calls that
// need no parallel operator of PyTorch: if both kinds of threads alternate, the spinning of one slows the other down.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "gated_aggregation.h"

namespace focalnet::cpu {

// The number of threads that work on a call, this one included: torch.get_num_threads(). The extension's own are at
// most as many as cpu_limit_threads allows, until torch.set_num_threads changes the number.
int64_t thread_count(Threads who);

// Calls work(argument) in this thread, and in up to `helpers` others that become free before that call returns. Waits
// only for helpers that have begun. Throws what any of them threw. Several threads may call this at the same time.
void run_with_helpers(int64_t helpers, void (*work)(void*), void* argument);

// Calls `work()` concurrently in up to `threads` threads, including this one.
template <typename Work>
void on_threads(Threads who, int64_t threads, const Work& work) {
    if (who == Threads::kTorch)
        return torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) work();
        });
    run_with_helpers(threads - 1, [](void* w) { (*static_cast<const Work*>(w))(); }, const_cast<Work*>(&work));
}

}  // namespace focalnet::cpu
