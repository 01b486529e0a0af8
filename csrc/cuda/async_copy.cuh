// Copies from global to shared memory that pass no register, from sm_80 on (cp.async): as many in flight as a thread
// asks for. The tests make them when they are waited for (tests/cuda/cuda_on_cpu/cuda_runtime.h).

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace focalnet::cuda {

// BYTES, 4, 8 or 16, aligned to that many on both sides. Only the first `given` are read, the others become zero.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, int given = BYTES) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
#ifndef __CUDACC__
    cuda_on_cpu::copy_async(to, from, BYTES, given);
#else
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(given) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(BYTES), "r"(given)
                     : "memory");
#endif
}

// A sector of 32 bytes of global memory into L2, some time. Nothing depends on it. The tests read it, which shows an
// address that no tensor has.
__device__ __forceinline__ void prefetch(const void* from) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
#else
    (void)*static_cast<const volatile unsigned char*>(from);
#endif
}

// Until all that this thread asked for are made; a barrier after it, and other threads see them.
__device__ __forceinline__ void wait_for_copies() {
#ifndef __CUDACC__
    cuda_on_cpu::wait_for_copies();
#else
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace focalnet::cuda
