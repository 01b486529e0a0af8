// Scratch memory: uninitialised floats that start on a cache line (a vector load across two lines costs two loads).
// Allocations of 2 MB and more use huge pages if the system has them. With ordinary pages, the addresses of a block
// are spread over the sets of L2 at random, and a page-table walk on a virtual machine takes a hundred cycles.

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

// Asks for huge pages wherever a whole one fits. If the system refuses, the memory keeps ordinary pages.
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

// Memory that a thread keeps between calls, so that calls need no fresh pages. It grows to the largest request, and
// loses its contents when it grows.
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
