// ldmatrix, mma.m16n8k16 and m16n8k8 on a CPU, from the layouts of fragments in the PTX ISA. They are collective:
// every lane of a warp lays down what it brings, waits for the others, and takes what it is to hold; after ldmatrix it
// waits once more, since what was read is not a copy. Bank conflicts of ldmatrix are counted: a matrix is read in one
// pass if its eight rows of 16 bytes lie in eight different quarters of the 32 banks, and every further row in the
// same quarter costs a pass more.

#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace cuda_on_cpu {

inline long matrices_loaded = 0, extra_passes = 0;  // of ldmatrix

inline const Fiber& of_lane(int lane) { return *fibers[threadIdxOf / kWarp * kWarp + lane]; }

// Of the eight rows of one matrix: how many passes beyond the first.
inline int extra_passes_of(int matrix) {
    uintptr_t rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = reinterpret_cast<uintptr_t>(of_lane(8 * matrix + i).address) / 16;
    std::sort(rows, rows + 8);
    int in_quarter[8] = {}, most = 0;
    for (int i = 0; i < 8; ++i)
        if (i == 0 || rows[i] != rows[i - 1]) most = max(most, ++in_quarter[rows[i] % 8]);
    return most - 1;
}

inline uint32_t pair(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }

inline void ldmatrix(uint32_t* const* registers, int matrices, const void* row, bool transposed) {
    const int lane = threadIdxOf % kWarp, g = lane / 4, t = lane % 4;
    if (lane < 8 * matrices && reinterpret_cast<uintptr_t>(row) % 16)
        fail("ldmatrix: a row is not aligned to 16 bytes");
    fibers[threadIdxOf]->address = row;
    wait(Fiber::kAtShuffle);
    for (int m = 0; m < matrices; ++m) {
        const auto element = [&](int i, int j) { return static_cast<const uint16_t*>(of_lane(8 * m + i).address)[j]; };
        *registers[m] = transposed ? pair(element(2 * t, g), element(2 * t + 1, g))
                                   : pair(element(g, 2 * t), element(g, 2 * t + 1));
        if (lane == 0) extra_passes += extra_passes_of(m);
    }
    if (lane == 0) matrices_loaded += matrices;
    wait(Fiber::kAtShuffle);
}

// Most of a run is spent from here on, and the kernels are compiled with -Og, which takes half the time of -O1.
#pragma GCC push_options
#pragma GCC optimize("O2")

inline float value_of(uint16_t bits, __half) {
    __half value;
    std::memcpy(&value, &bits, sizeof value);
    return __half2float(value);
}
inline float value_of(uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }

// The nearest float32 towards zero: tensor cores cut off what does not fit a sum.
inline float cut_off(double value) {
    const float nearest = static_cast<float>(value);
    return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

// K elements of the inner axis, 16 or 8, of the two rows of A and the two columns of B that four of the outputs need.
// Not instrumented: nothing of what is tested is read or written.
template <int K>
__attribute__((no_sanitize("address"))) void dot_products(const Fiber* const* lanes, int turn, int g, int t,
                                                          float (&c)[4]) {
    double rows[2][K], columns[2][K];
    for (int q = 0; q < 4; ++q) {
        const float* a = lanes[4 * g + q]->elements[turn];
        for (int i = 0; i < K / 2; ++i) rows[i / 2 % 2][i / 4 * 8 + 2 * q + i % 2] = a[i];
        for (int column = 0; column < 2; ++column) {
            const float* b = lanes[4 * (2 * t + column) + q]->elements[turn] + 8;
            for (int i = 0; i < K / 4; ++i) columns[column][i / 2 * 8 + 2 * q + i % 2] = b[i];
        }
    }
    for (int i = 0; i < 4; ++i) {
        double sum = 0;
        for (int k = 0; k < K; ++k) sum += rows[i / 2][k] * columns[i % 2][k];
        c[i] = cut_off(sum + c[i]);
    }
}

// K / 4 registers of A, K / 8 of B.
template <typename T, int K>
void mma_m16n8(float (&c)[4], const uint32_t* a, const uint32_t* b) {
    const int lane = threadIdxOf % kWarp;
    Fiber& mine = *fibers[threadIdxOf];
    const int turn = mine.turn ^= 1;
    float* elements = mine.elements[turn];
    for (int i = 0; i < K / 2; ++i) elements[i] = value_of(static_cast<uint16_t>(a[i / 2] >> i % 2 * 16), T{});
    for (int i = 0; i < K / 4; ++i) elements[8 + i] = value_of(static_cast<uint16_t>(b[i / 2] >> i % 2 * 16), T{});
    wait(Fiber::kAtShuffle);
    const Fiber* lanes[kWarp];
    for (int i = 0; i < kWarp; ++i) lanes[i] = fibers[threadIdxOf - lane + i].get();
    dot_products<K>(lanes, turn, lane / 4, lane % 4, c);
}

#pragma GCC pop_options

template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8<T, 16>(c, a, b);
}

template <typename T>
void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
    mma_m16n8<T, 8>(c, a, &b);
}

}  // namespace cuda_on_cpu
