// What the two ways of going backward on tensor cores share: whole maps (toeplitz_bwd.cu) and level by level
// (toeplitz_bwd_levels.cu). A block holds planes of block_c channels; `Block` says where they lie and which rows.

#pragma once

#include "toeplitz.cuh"

namespace focalnet::cuda {

// The taps of a level for every channel of a block, shared out to its warps.
template <typename T, typename Block>
__device__ __forceinline__ void load_taps(const Block& b, const void* weight, int kh, int kw, bool turned) {
    const auto& t = b.p.tiling;
    for (int c = b.warp; c < t.block_c; c += b.warps)
        write_taps<T>(b.taps + c * t.tap_rows * t.tap_pitch,
                      static_cast<const T*>(weight) + static_cast<int64_t>(b.first_c + c) * kh * kw, kh, kw,
                      toeplitz_steps(kw), b.first_c + c < b.p.C, turned, b.lane);
}

// The convolution of the planes whose first rows and columns `from` gives, with the taps in place: f(c, row, x, pair)
// for every pair of outputs of the first `columns`. A warp takes a tile of a channel.
template <int BLOCKS, int STEPS, typename T, typename Block, typename From, typename F>
__device__ __forceinline__ void convolve(const Block& b, From from, int kh, int columns, F f) {
    const auto& t = b.p.tiling;
    const int tiles = (b.count() + kMmaM - 1) / kMmaM * t.groups;
    const Rows rows = b.rows();
    for (int item = b.warp; item < t.block_c * tiles; item += b.warps) {
        const int c = item / tiles, first = item % tiles / t.groups * kMmaM;
        const int column = 8 * BLOCKS * (item % t.groups);
        const int row = min(first + b.lane % 16, b.count() - 1);
        const T* source =
            from(c) + rows.offset(row) - kh / 2 * t.pitch + column + 8 * (b.lane / 16) + 4 - 8 * STEPS;
        const T* taps = b.taps + c * t.tap_rows * t.tap_pitch + tap_of_lane(b.lane, 16 * STEPS + 8);
        float sum[BLOCKS][4] = {};
        convolve_tile<T, BLOCKS, STEPS>(sum, shared_address(source), t.pitch * static_cast<int>(sizeof(T)), taps, kh);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int y = first + b.lane / 4 + 8 * half;
            if (y >= b.count()) continue;
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j) {
                const int x = column + 8 * j + 2 * (b.lane % 4);
                if (x < columns) f(c, y, x, float2{sum[j][2 * half], sum[j][2 * half + 1]});
            }
        }
    }
}

// f(kw's number of steps) as a constant.
template <typename F>
__device__ __forceinline__ void with_steps(int kw, F f) {
    if (toeplitz_steps(kw) == 1)
        f(std::integral_constant<int, 1>{});
    else
        f(std::integral_constant<int, 2>{});
}

// Two positions of N channels, planar, into a contiguous channels-last map.
template <typename T, int N, typename Block>
__device__ __forceinline__ void write_channels(const Block& b, void* to, int64_t position, int c, int x,
                                               const float2 (&values)[N]) {
    float left[N], right[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
        left[k] = values[k].x;
        right[k] = values[k].y;
    }
    T* at = static_cast<T*>(to) + position * b.p.C + b.first_c + c;
    Vector<T, N>::store(at, left);
    if (x + 1 < b.p.W) Vector<T, N>::store(at + b.p.C, right);
}

// A pair of columns of a map of W: what lies beyond is zero.
__device__ __forceinline__ float2 inside_map(float2 value, int x, int W) {
    return {x < W ? value.x : 0.0f, x + 1 < W ? value.y : 0.0f};
}

}  // namespace focalnet::cuda
