// Jobs of the extension's own threads in which one thread runs out of memory. Prints how many of them the caller learnt
// of: first those where a helper fails, then those where the caller itself does.

#include <atomic>
#include <chrono>
#include <cstdio>
#include <new>
#include <thread>

#include "threads.h"

using focalnet::cpu::on_threads;
using focalnet::cpu::Threads;

int failures(bool in_helper) {
    const auto caller = std::this_thread::get_id();
    int caught = 0;
    for (int job = 0; job < 50; ++job) {
        std::atomic<bool> failed{false};
        const auto work = [&] {
            const bool is_helper = std::this_thread::get_id() != caller;
            if (is_helper == in_helper && !failed.exchange(true)) throw std::bad_alloc();
            while (!failed) std::this_thread::yield();
        };
        try {
            on_threads(Threads::kOwn, 3, work);
        } catch (const std::bad_alloc&) {
            ++caught;
        }
    }
    return caught;
}

int main() {
    const int of_helpers = failures(true), of_callers = failures(false);
    std::printf("%d %d\n", of_helpers, of_callers);
}
