// The weight gradient of a depthwise convolution from two planes in shared memory: its input, and the gradient dz of
// its output. A thread owns a row of the kernel and a pair of channels and keeps the row's sums in registers; the
// threads left over take other rows of the tile, and the groups add up in shared memory, in a fixed order.

#pragma once

#include "tile.cuh"

namespace focalnet::cuda {

struct Correlation {
    int kh, kw, C;
    float* to;  // [kh * kw][C]
};

// The columns kx0 .. kx0 + N - 1 of the weight gradient over the tile. A thread owns a row of the kernel and a pair of
// channels, keeps N sums in registers, and takes every `groups`-th row of the tile; the groups add up in `sums`, one
// value of every thread and column.
template <int N, typename T>
__device__ __forceinline__ void correlate_columns(const Plane<T>& input, const Plane<T>& dz, Region inside,
                                                  Region tile, const Correlation& p, int kx0, int first_c,
                                                  float2* sums) {
    const int pairs = input.block_c / 2, owners = pairs * p.kh, threads = blockDim.x;
    const int abreast = min(owners, threads), groups = threads / abreast;
    const int slot = threadIdx.x % abreast, group = threadIdx.x / abreast;
    for (int first = 0; first < owners; first += abreast) {
        const int owner = first + slot, c = owner % pairs * 2, ky = owner / pairs;
        if (group < groups && owner < owners) {
            float2 acc[N] = {};
#pragma unroll 1
            for (int y = tile.y0 + group; y < tile.y1; y += groups) {
                const int row = y + ky - p.kh / 2;
                if (row < inside.y0 || row >= inside.y1) continue;
#pragma unroll 1
                for (int x = tile.x0; x < tile.x1; x += kRunX) {
                    const int left = x + kx0 - p.kw / 2;
                    float2 values[N + kRunX - 1];
#pragma unroll
                    for (int i = 0; i < N + kRunX - 1; ++i) {
                        const bool exists =
                            static_cast<unsigned>(left + i - inside.x0) < static_cast<unsigned>(inside.columns());
                        values[i] = exists ? load_pair(input.at(row, left + i, c)) : float2{0.0f, 0.0f};
                    }
#pragma unroll
                    for (int rx = 0; rx < kRunX; ++rx) {
                        const float2 d = x + rx < tile.x1 ? load_pair(dz.at(y, x + rx, c)) : float2{0.0f, 0.0f};
#pragma unroll
                        for (int kx = 0; kx < N; ++kx) {
                            acc[kx].x = fmaf(values[rx + kx].x, d.x, acc[kx].x);
                            acc[kx].y = fmaf(values[rx + kx].y, d.y, acc[kx].y);
                        }
                    }
                }
            }
#pragma unroll
            for (int kx = 0; kx < N; ++kx) sums[(group * N + kx) * abreast + slot] = acc[kx];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < abreast * N; i += threads) {
            const int owner = first + i % abreast, kx = i / abreast, c = first_c + owner % pairs * 2;
            if (owner >= owners) continue;
            float2 sum = {0.0f, 0.0f};
            for (int g = 0; g < groups; ++g) {
                sum.x += sums[(g * N + kx) * abreast + i % abreast].x;
                sum.y += sums[(g * N + kx) * abreast + i % abreast].y;
            }
            float* tap = p.to + static_cast<int64_t>(owner / pairs * p.kw + kx0 + kx) * p.C;
            if (c < p.C) tap[c] = sum.x;
            if (c + 1 < p.C) tap[c + 1] = sum.y;
        }
        __syncthreads();
    }
}

template <typename T>
__device__ __forceinline__ void correlate(const Plane<T>& input, const Plane<T>& dz, Region inside, Region tile,
                                          const Correlation& p, int first_c, float2* sums) {
    for (int kx = 0; kx < p.kw;) {
        with_columns(p.kw - kx, [&](auto columns) {
            constexpr int N = decltype(columns)::value;
            correlate_columns<N>(input, dz, inside, tile, p, kx, first_c, sums);
            kx += N;
        });
    }
}

}  // namespace focalnet::cuda
