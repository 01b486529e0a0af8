// What the kernels do with a plane: a region of one image, block_c channels of it, in shared memory.
//
//     plane   [rows][pitch]: a row is [columns][block_c] elements, then padding. A thread reads pairs of channels;
//             the lanes of a warp take the pairs of a position first, then the next pair of rows. The pitch is such
//             that two rows lie block_c channels apart modulo the 32 banks (plan.cpp), so a warp touches each bank
//             once.
//     weights [taps][block_c] in float32: one conversion instead of one a use. Lanes in other rows read the same
//             address, which costs nothing.
//
// A thread computes kRunY x kRunX outputs of a pair of channels: every input it reads serves up to kRunY * kw of them,
// from registers. kRunX divides the published maps, 7 to 56 columns.

#pragma once

#include "element.cuh"
#include "gated_aggregation.h"
#include "gelu.cuh"

#ifndef FOCALNET_SHARED_MEMORY
#define FOCALNET_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace focalnet::cuda {

struct Region {  // in coordinates of the map, ends excluded
    int y0, y1, x0, x1;
    __device__ __forceinline__ int rows() const { return y1 - y0; }
    __device__ __forceinline__ int columns() const { return x1 - x0; }
    __device__ __forceinline__ bool contains(int y, int x) const { return y >= y0 && y < y1 && x >= x0 && x < x1; }
};

__device__ __forceinline__ Region grow(Region r, int dy, int dx, int H, int W) {
    return {max(0, r.y0 - dy), min(H, r.y1 + dy), max(0, r.x0 - dx), min(W, r.x1 + dx)};
}

template <typename T>
struct Plane {
    T* data;
    int y0, x0;  // the map's coordinates of its first element
    int pitch, block_c;
    __device__ __forceinline__ T* at(int y, int x, int c) const {
        return data + (y - y0) * pitch + (x - x0) * block_c + c;
    }
};

// Walks over positions of a region, `stride` apart, with one division a thread instead of one a position.
struct Walk {
    int y, x, end, step_y, step_x, x0, columns;
    __device__ __forceinline__ Walk(Region r, int start, int stride)
        : y(r.y0 + start / r.columns()),
          x(start % r.columns()),
          end(r.y1),
          step_y(stride / r.columns()),
          step_x(stride % r.columns()),
          x0(r.x0),
          columns(r.columns()) {}
    __device__ __forceinline__ bool more() const { return y < end; }
    __device__ __forceinline__ int column() const { return x0 + x; }
    __device__ __forceinline__ void next() {
        y += step_y;
        x += step_x;
        if (x >= columns) {
            x -= columns;
            ++y;
        }
    }
};

// Calls f(y, x, c) for every position of the region and every N-th of block_c channels, shared out to the block.
template <int N, typename F>
__device__ __forceinline__ void for_each_vector(Region region, int block_c, F f) {
    const int vectors = block_c / N, c = threadIdx.x % vectors * N;
    Walk walk(region, threadIdx.x / vectors, blockDim.x / vectors);
#pragma unroll 4
    for (; walk.more(); walk.next()) f(walk.y, walk.column(), c);
}

// f(width) with the vector's width as a constant: 16 bytes, 8 bytes of 16-bit elements (a projection with three levels
// is aligned to that), one element. It divides C, so a vector lies within the map or beyond it.
template <typename T, typename F>
__device__ __forceinline__ void with_width(int width, F f) {
    constexpr int kMaxWidth = 16 / sizeof(T);
    if (width == kMaxWidth) return f(std::integral_constant<int, kMaxWidth>{});
    if (width == 4) return f(std::integral_constant<int, 4>{});
    f(std::integral_constant<int, 1>{});
}

// plane = value(y, x, c, floats) over a region; the channels beyond C become zero.
template <typename T, int N, typename F>
__device__ __forceinline__ void fill(const Plane<T>& plane, Region region, int first_c, int C, F value) {
    for_each_vector<N>(region, plane.block_c, [&](int y, int x, int c) {
        float values[N] = {};
        if (first_c + c < C) value(y, x, first_c + c, values);
        store_shared<T, N>(plane.at(y, x, c), values);
    });
}

// weights[tap][c] of one level, from (C, kh * kw).
template <typename T>
__device__ __forceinline__ void load_weights(float* weights, const void* from, int taps, int block_c, int first_c,
                                             int C) {
    const T* source = static_cast<const T*>(from);
    for (int i = threadIdx.x; i < taps * block_c; i += blockDim.x) {
        const int c = first_c + i % block_c;
        weights[i] = c < C ? to_float(source[static_cast<int64_t>(c) * taps + i / block_c]) : 0.0f;
    }
}

// f(n) with the number of a kernel's columns to take next, of those that are left, as a constant. 3, 5 and 7 go at
// once, 9 as 5 + 4, 11 as 7 + 4, 13 as 7 + 3 + 3, 15 as 7 + 4 + 4: no more columns than registers hold, and five
// bodies to compile instead of one for every width.
template <typename F>
__device__ __forceinline__ void with_columns(int left, F f) {
    if (left == 7 || left >= 11) return f(std::integral_constant<int, 7>{});
    if (left == 5 || left >= 9) return f(std::integral_constant<int, 5>{});
    if (left == 4 || left == 8) return f(std::integral_constant<int, 4>{});
    if (left == 3 || left == 6) return f(std::integral_constant<int, 3>{});
    f(std::integral_constant<int, 1>{});
}

using Outputs = float2[kRunY][kRunX];

// A depthwise kernel, its taps in shared memory: at first + (ky * kw + kx) * step. A negative step turns it around.
struct Taps {
    const float* first;
    int step, kh, kw;
};

// acc += the kernel's columns kx0 .. kx0 + N - 1 over the outputs whose upper left is (y, x). The plane holds
// `inside`; what is beyond is zero.
template <int N, typename T>
__device__ __forceinline__ void convolve_columns(const Plane<T>& plane, Region inside, const Taps& taps, int kx0,
                                                 int y, int x, int c, Outputs& acc) {
    const int left = x + kx0 - taps.kw / 2;
#pragma unroll 1
    for (int iy = 0; iy < taps.kh + kRunY - 1; ++iy) {
        const int row = y + iy - taps.kh / 2;
        if (row < inside.y0 || row >= inside.y1) continue;
        float2 input[N + kRunX - 1];
#pragma unroll
        for (int i = 0; i < N + kRunX - 1; ++i) {
            const bool exists = static_cast<unsigned>(left + i - inside.x0) < static_cast<unsigned>(inside.columns());
            input[i] = exists ? load_pair(plane.at(row, left + i, c)) : float2{0.0f, 0.0f};
        }
#pragma unroll
        for (int ry = 0; ry < kRunY; ++ry) {
            const int ky = iy - ry;
            if (static_cast<unsigned>(ky) >= static_cast<unsigned>(taps.kh)) continue;
            const float* w = taps.first + (ky * taps.kw + kx0) * taps.step + c;
#pragma unroll
            for (int kx = 0; kx < N; ++kx) {
                const float2 weight = load_pair(w + kx * taps.step);
#pragma unroll
                for (int rx = 0; rx < kRunX; ++rx) {
                    acc[ry][rx].x = fmaf(input[rx + kx].x, weight.x, acc[ry][rx].x);
                    acc[ry][rx].y = fmaf(input[rx + kx].y, weight.y, acc[ry][rx].y);
                }
            }
        }
    }
}

template <typename T>
__device__ __forceinline__ void convolve(const Plane<T>& plane, Region inside, const Taps& taps, int y, int x, int c,
                                         Outputs& acc) {
#pragma unroll
    for (int ry = 0; ry < kRunY; ++ry)
#pragma unroll
        for (int rx = 0; rx < kRunX; ++rx) acc[ry][rx] = {0.0f, 0.0f};
    for (int kx = 0; kx < taps.kw;) {
        with_columns(taps.kw - kx, [&](auto columns) {
            constexpr int N = decltype(columns)::value;
            convolve_columns<N>(plane, inside, taps, kx, y, x, c, acc);
            kx += N;
        });
    }
}

// f(y, x, c, value) for every output of a depthwise convolution over `outputs`, shared out to the block in runs.
template <typename T, typename F>
__device__ __forceinline__ void for_each_convolved(const Plane<T>& plane, Region inside, const Taps& taps,
                                                   Region outputs, F f) {
    const int pairs = plane.block_c / 2, row_runs = (outputs.rows() + kRunY - 1) / kRunY;
    const int items = pairs * row_runs * ((outputs.columns() + kRunX - 1) / kRunX);
    for (int item = threadIdx.x; item < items; item += blockDim.x) {
        const int c = item % pairs * 2, run = item / pairs;
        const int y = outputs.y0 + run % row_runs * kRunY, x = outputs.x0 + run / row_runs * kRunX;
        Outputs acc;
        convolve(plane, inside, taps, y, x, c, acc);
#pragma unroll
        for (int ry = 0; ry < kRunY; ++ry)
#pragma unroll
            for (int rx = 0; rx < kRunX; ++rx)
                if (y + ry < outputs.y1 && x + rx < outputs.x1) f(y + ry, x + rx, c, acc[ry][rx]);
    }
}

// Sum over the threads of `value` that own the same pair of channels, in a fixed order; left in sums[0 .. pairs - 1].
// `sums` has room for a value of every thread.
__device__ __forceinline__ void sum_pairs(float2* sums, float2 value, int pairs) {
    sums[threadIdx.x] = value;
    __syncthreads();
    for (int half = blockDim.x / 2; half >= pairs; half /= 2) {
        if (static_cast<int>(threadIdx.x) < half) {
            sums[threadIdx.x].x += sums[threadIdx.x + half].x;
            sums[threadIdx.x].y += sums[threadIdx.x + half].y;
        }
        __syncthreads();
    }
}

// Two channels of a contiguous map; `paired` says that C is even, and both are within it or neither.
template <typename T>
__device__ __forceinline__ void store_channels(T* to, float2 value, int c, int C, bool paired) {
    if (paired) {
        if (c < C) store_pair(to, value);
    } else {
        if (c < C) to[0] = from_float<T>(value.x);
        if (c + 1 < C) to[1] = from_float<T>(value.y);
    }
}

template <typename T>
__device__ __forceinline__ float2 load_channels(const T* from, int c, int C, bool paired) {
    if (paired) return c < C ? load_pair(from) : float2{0.0f, 0.0f};
    return {c < C ? to_float(from[0]) : 0.0f, c + 1 < C ? to_float(from[1]) : 0.0f};
}

// result += gate * value, over N channels.
template <int N>
__device__ __forceinline__ void add_gated(float (&result)[N], float gate, const float* values) {
#pragma unroll
    for (int k = 0; k < N; ++k) result[k] = fmaf(gate, values[k], result[k]);
}

// The gated sum of N channels at a position: levels planes, the first of them under gate[0].
template <int N, typename T, typename F>
__device__ __forceinline__ void add_levels(float (&result)[N], const T* gate, int levels, F plane_of) {
    float values[N];
    for (int i = 0; i < levels; ++i) {
        load_shared<T, N>(plane_of(i), values);
        add_gated(result, to_float(gate[i]), values);
    }
}

}  // namespace focalnet::cuda
