// The extension's own threads: helpers that take part in jobs which callers put on a list.
//
//     caller   lists its job, wakes helpers, works, takes the job off the list, waits for the helpers inside it
//     helper   takes a place in a listed job, works, leaves; spins for a while, then sleeps
//
// Whatever a job's work is cut into, everybody takes the next piece from one counter (work_sharing.h), so the caller
// alone completes it if nobody comes.

#include "threads.h"

#include <atomic>
#include <chrono>
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

// Longer than a caller needs from one job to the next inside a forward, far below a time slice.
constexpr auto kSpin = std::chrono::microseconds(100);

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Until `done()`, which may change whenever `changes` does: spinning first, then asleep.
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
    int64_t places;               // for helpers, guarded by the pool's mutex
    std::atomic<int> helping{0};  // those inside; grows under the mutex only while the job is listed
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
        job.work(job.argument);
        {
            const std::lock_guard lock(mutex_);
            std::erase(listed_, &job);
        }
        wait(departures_, [&] { return job.helping.load(std::memory_order_acquire) == 0; });
    }

  private:
    // Helpers outlive their caller and sleep until the process ends. Without a thread, work goes on with fewer.
    void start_helpers(int64_t wanted) {
        try {
            for (; helpers_ < wanted; ++helpers_) std::thread([this] { help(); }).detach();
        } catch (const std::system_error&) {
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
            job->work(job->argument);
            // The caller may destroy the job as soon as nobody is inside.
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

// Never destroyed: helpers sleep in it when the process ends. A child made by fork has no helpers and gets another.
std::atomic<Pool*>& pool() {
    static std::atomic<Pool*> instance{new Pool};
    return instance;
}

#if !defined(_WIN32)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { pool().store(new Pool); });
#endif

}  // namespace

void run_with_helpers(int64_t helpers, void (*work)(void*), void* argument) {
    if (helpers <= 0) return work(argument);
    Job job{work, argument, helpers};
    pool().load(std::memory_order_acquire)->run(job);
}

}  // namespace focalnet::cpu
