// Who works on a range beside the calling thread: PyTorch's threads, or the extension's own.
//
// PyTorch's (OpenMP's) wait for work and for each other by spinning, for milliseconds, and a parallel region ends only
// when every thread has been there, even one that another process keeps off its core. Threads of the extension sleep
// after kSpin, and a thread that comes late finds its work done and is not waited for. They serve calls that need no
// parallel operator of PyTorch: where both kinds take turns, the spinning of one slows the other down.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "gated_aggregation.h"

namespace focalnet::cpu {

// Calls work(argument) in this thread, and in up to `helpers` others that are free before it returns here. Waits for
// those that have begun, and for no other. May be called by several threads at a time.
void run_with_helpers(int64_t helpers, void (*work)(void*), void* argument);

// Calls `work()` in up to `threads` threads at the same time, at least in this one.
template <typename Work>
void on_threads(Threads who, int64_t threads, const Work& work) {
    if (who == Threads::kTorch)
        return torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) work();
        });
    run_with_helpers(threads - 1, [](void* w) { (*static_cast<const Work*>(w))(); }, const_cast<Work*>(&work));
}

}  // namespace focalnet::cpu
