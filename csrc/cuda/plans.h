// Plans that were made are kept: one takes tens of microseconds, and is the same every time.

#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "gated_aggregation.h"

namespace focalnet::cuda {

// Everything that a plan depends on.
inline std::vector<int64_t> key_of(const Problem& p, int level) {
    const Limits& d = p.limits;
    std::vector<int64_t> key{static_cast<int64_t>(p.element),
                             p.B,
                             p.H,
                             p.W,
                             p.C,
                             p.L,
                             level,
                             d.shared_per_block,
                             d.shared_per_multiprocessor,
                             d.multiprocessors};
    for (int l = 0; l < p.L; ++l) key.insert(key.end(), {p.weights[l].kh, p.weights[l].kw});
    return key;
}

template <typename Plan>
class Plans {
  public:
    template <typename F>
    Plan get(const Problem& p, int level, F make) {
        const std::vector<int64_t> key = key_of(p, level);
        const std::lock_guard<std::mutex> lock(mutex_);
        if (const auto found = plans_.find(key); found != plans_.end()) return found->second;
        constexpr size_t kMaxPlans = 4096;  // of one process; when there are more, all are dropped
        if (plans_.size() >= kMaxPlans) plans_.clear();
        return plans_[key] = make();
    }

  private:
    std::mutex mutex_;
    std::map<std::vector<int64_t>, Plan> plans_;
};

}  // namespace focalnet::cuda
