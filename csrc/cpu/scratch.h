// Scratch memory: uninitialised floats that start on a cache line (a vector load that straddles two lines costs two),
// and from 2 MB on at huge pages where the system has them. Behind ordinary pages the addresses of a block fall into
// the sets of the L2 as chance has it, and walking the page tables of a virtual machine costs a hundred cycles.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace focalnet::cpu {

constexpr size_t kLineBytes = 64, kHugePageBytes = size_t{2} << 20;

struct FreeFloats {
    std::align_val_t alignment{kLineBytes};
    void operator()(float* p) const { ::operator delete(p, alignment); }
};
using Floats = std::unique_ptr<float[], FreeFloats>;

// Asks for huge pages where whole ones fit. Advice: where it is refused, ordinary pages serve.
inline void prefer_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHugePageBytes - 1) / kHugePageBytes;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePageBytes;
    if (begin < end)
        madvise(reinterpret_cast<void*>(begin * kHugePageBytes), (end - begin) * kHugePageBytes, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

inline Floats floats(int64_t n) {
    const size_t bytes = static_cast<size_t>(n) * sizeof(float);
    const std::align_val_t alignment{bytes >= kHugePageBytes ? kHugePageBytes : kLineBytes};
    void* memory = ::operator new(bytes, alignment);
    prefer_huge_pages(memory, bytes);
    return Floats(static_cast<float*>(memory), FreeFloats{alignment});
}

// Memory that a thread keeps from call to call, so that no call pays for fresh pages. Grows to the largest request;
// what it held is lost then.
class Memory {
  public:
    float* get(int64_t n) {
        if (n > size_) {
            data_.reset();
            size_ = 0;
            data_ = floats(n);
            size_ = n;
        }
        return data_.get();
    }

  private:
    Floats data_;
    int64_t size_ = 0;
};

}  // namespace focalnet::cpu
