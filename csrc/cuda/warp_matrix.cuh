// Matrix instructions of a warp, from sm_80 on: ldmatrix and mma.m16n8k16, with 16-bit operands and float32 sums. With
// g = lane / 4 and t = lane % 4 a lane holds, two elements of 16 bits a register (PTX ISA, "Matrix fragments for
// mma.m16n8k16"):
//
//     A (16 x 16)   a0: row g, columns 2t, 2t + 1    a1: row g + 8    a2: row g, columns + 8    a3: row g + 8, columns
//     + 8 B (16 x 8)    b0: rows 2t, 2t + 1 of column g                   b1: rows + 8 C (16 x 8)    c0, c1: row g,
//     columns 2t, 2t + 1                 c2, c3: row g + 8
//
// ldmatrix loads 8 x 8 matrices whose rows are 16 bytes, aligned to 16. Lane i gives the address of row i % 8 of
// matrix i / 8, and holds of every matrix columns 2t, 2t + 1 of row g; transposed, rows 2t, 2t + 1 of column g.
//
// The tests run all of this on a CPU (tests/cuda/cuda_on_cpu/warp_matrix.h).

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#ifndef __CUDACC__
#include <warp_matrix.h>  // of the tests
#endif

namespace focalnet::cuda {

constexpr int kWarp = 32;
constexpr int kMmaM = 16, kMmaN = 8, kMmaK = 16;

#ifndef __CUDACC__

using SharedAddress = uintptr_t;
__device__ inline SharedAddress shared_address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

template <bool TRANSPOSED>
__device__ inline void ldmatrix_x4(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, SharedAddress row) {
    uint32_t* const registers[] = {&r0, &r1, &r2, &r3};
    cuda_on_cpu::ldmatrix(registers, 4, reinterpret_cast<const void*>(row), TRANSPOSED);
}

template <bool TRANSPOSED>
__device__ inline void ldmatrix_x2(uint32_t& r0, uint32_t& r1, SharedAddress row) {
    uint32_t* const registers[] = {&r0, &r1};
    cuda_on_cpu::ldmatrix(registers, 2, reinterpret_cast<const void*>(row), TRANSPOSED);
}

template <typename T>
__device__ inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1) {
    const uint32_t a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
    cuda_on_cpu::mma_m16n8k16<T>(c, a, b);
}

template <typename T>
__device__ inline void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    const uint32_t a[] = {a0, a1};
    cuda_on_cpu::mma_m16n8k8<T>(c, a, b0);
}

#else

// An address in shared memory, as the instructions take it.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <bool TRANSPOSED>
__device__ __forceinline__ void ldmatrix_x4(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3,
                                            SharedAddress row) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
                     : "r"(row)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
                     : "r"(row)
                     : "memory");
}

template <bool TRANSPOSED>
__device__ __forceinline__ void ldmatrix_x2(uint32_t& r0, uint32_t& r1, SharedAddress row) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r0), "=r"(r1)
                     : "r"(row)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r0), "=r"(r1)
                     : "r"(row)
                     : "memory");
}

template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The first or second half of mma's sum, m16n8k8: a0, a1 and b0, or a2, a3 and b1.
template <typename T>
__device__ __forceinline__ void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(b0));
    else
        asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(b0));
}

#endif

}  // namespace focalnet::cuda
