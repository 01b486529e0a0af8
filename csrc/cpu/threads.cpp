// The extension's own threads: helpers that join the jobs that callers put on a list.
//
//     caller   lists its job, wakes helpers, works, takes the job off the list, waits for the helpers still in it
//     helper   takes a place in a listed job, works, leaves; spins for a while, then sleeps
//
// All threads in a job take pieces of its work from one counter (work_sharing.h), so the caller completes the job
// alone if no helper joins.

#include "threads.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace focalnet::cpu {
namespace {

// Longer than the gap between two jobs of a forward, and far shorter than a time slice.
constexpr auto kSpin = std::chrono::microseconds(100);

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits until `done()` holds, first spinning and then asleep. `done` is evaluated again whenever `changes` changes.
template <typename Done>
void wait(const std::atomic<int>& changes, const Done& done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    for (;;) {
        const int seen = changes.load(std::memory_order_acquire);
        if (done()) return;
        while (changes.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < end)
            for (int i = 0; i < 16; ++i) pause();
        changes.wait(seen, std::memory_order_acquire);
    }
}

struct Job {
    void (*work)(void*);
    void* argument;
    int64_t places;               // free places for helpers, guarded by the pool's mutex
    std::atomic<int> helping{0};  // helpers in the job; grows only while the job is listed, under the mutex
    std::exception_ptr failure;   // of any thread, guarded by the mutex until no helper is in the job
};

class Pool {
  public:
    void run(Job& job) {
        {
            const std::lock_guard lock(mutex_);
            start_helpers(job.places);
            listed_.push_back(&job);
        }
        arrivals_.fetch_add(1, std::memory_order_release);
        arrivals_.notify_all();
        work(job);
        {
            const std::lock_guard lock(mutex_);
            std::erase(listed_, &job);
        }
        wait(departures_, [&] { return job.helping.load(std::memory_order_acquire) == 0; });
        if (job.failure != nullptr) std::rethrow_exception(job.failure);
    }

  private:
    // Helpers outlive their caller and sleep until the process ends. If no more can be started, there are fewer.
    void start_helpers(int64_t wanted) {
        try {
            for (; helpers_ < wanted; ++helpers_) std::thread([this] { help(); }).detach();
        } catch (const std::system_error&) {
        }
    }

    // Memory for scratch may run out in any thread. The caller fails with that, once no helper uses what it owns.
    void work(Job& job) {
        try {
            job.work(job.argument);
        } catch (...) {
            const std::lock_guard lock(mutex_);
            job.failure = std::current_exception();
        }
    }

    Job* take_place() {
        const std::lock_guard lock(mutex_);
        for (Job* job : listed_)
            if (job->places > 0) {
                --job->places;
                job->helping.fetch_add(1, std::memory_order_relaxed);
                return job;
            }
        return nullptr;
    }

    [[noreturn]] void help() {
        for (;;) {
            Job* job = nullptr;
            wait(arrivals_, [&] { return (job = take_place()) != nullptr; });
            work(*job);
            // The caller may destroy the job as soon as no helper is in it.
            job->helping.fetch_sub(1, std::memory_order_release);
            departures_.fetch_add(1, std::memory_order_release);
            departures_.notify_all();
        }
    }

    std::mutex mutex_;
    std::vector<Job*> listed_;
    int64_t helpers_ = 0;
    std::atomic<int> arrivals_{0}, departures_{0};  // counters to wait on
};

// Never destroyed, because helpers still wait in it when the process ends. A forked child has no helpers, so it gets a
// new pool.
std::atomic<Pool*>& pool() {
    static std::atomic<Pool*> instance{new Pool};
    return instance;
}

#if !defined(_WIN32)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { pool().store(new Pool); });
#endif

// The most threads of the extension (0: any number), and PyTorch's number when that was set.
std::atomic<int64_t> limit{0}, torch_threads_then{0};

void cpu_limit_threads(int64_t most) {
    STD_TORCH_CHECK(most >= 0, "most is ", most, "; expected a number of threads, or 0 for no limit");
    torch_threads_then = static_cast<int64_t>(torch::stable::get_num_threads());
    limit = most;
}

int64_t cpu_threads() { return thread_count(Threads::kOwn); }

}  // namespace

int64_t thread_count(Threads who) {
    const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const int64_t most = limit.load(std::memory_order_relaxed);
    const bool limited = who == Threads::kOwn && most > 0 && threads == torch_threads_then;
    return limited ? std::min(threads, most) : threads;
}

void run_with_helpers(int64_t helpers, void (*work)(void*), void* argument) {
    if (helpers <= 0) return work(argument);
    Job job{work, argument, helpers};
    pool().load(std::memory_order_acquire)->run(job);
}

}  // namespace focalnet::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(focalnet, m) {
    m.def("cpu_limit_threads(int most) -> ()");
    m.def("cpu_threads() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(focalnet, CompositeExplicitAutograd, m) {
    m.impl("cpu_limit_threads", TORCH_BOX(&focalnet::cpu::cpu_limit_threads));
    m.impl("cpu_threads", TORCH_BOX(&focalnet::cpu::cpu_threads));
}
