// What the kernels on tensor cores do with a planar plane in shared memory: the rows of one channel, of one image or
// of several one above the other, each with a halo of zeros.
//
//     plane   [rows][pitch] of T; column x of the map lies at padding + x, and padding is 4 or 12. Blocks of eight
//             columns of outputs then start four columns after a multiple of 16 bytes, so their sixteen columns of
//             input start at one: what ldmatrix wants, for every kernel. The pitch is an odd number of 16 bytes.
//     taps    of one channel and level, [kh][2][16 * steps + 8]: a row of zeros, taps, zeros, and the same a column
//             further. The two rows of T in a register are neighbours there: aligned in the first copy for odd columns
//             of T, in the second for even ones.
//
// A tile is sixteen rows and BLOCKS blocks of eight columns: neighbouring blocks share fragments, so a row of the
// kernel takes (BLOCKS + 1) / 2 ldmatrix of four matrices, two loads of taps, and two half mma for a block: a whole
// one wants its four registers of A in a row, and shared fragments would be copied, four moves for every second block.

#pragma once

#include "element.cuh"
#include "tile.cuh"
#include "toeplitz.h"
#include "warp_matrix.cuh"

namespace focalnet::cuda {

// Which rows of a block's planes belong to which image: `held` rows of each, `slot` rows from one to the next.
struct Rows {
    int held, slot, pitch;
    unsigned inverse;  // of held, in 1 / 65536: exact for the rows of several images (kMaxStackedRows); of one image 0

    __device__ __forceinline__ Rows(int images, int held, int slot, int pitch)
        : held(held), slot(slot), pitch(pitch), inverse(images > 1 ? (65536u + held - 1) / held : 0u) {}
    __device__ __forceinline__ int image(int row) const { return static_cast<int>(row * inverse >> 16); }
    // Elements from the first row of the first image to that of a row.
    __device__ __forceinline__ int offset(int row) const { return (row + image(row) * (slot - held)) * pitch; }
};

__device__ __forceinline__ uint32_t load_word(const void* p) { return *static_cast<const uint32_t*>(p); }

// Where a lane finds its two elements of the taps' Toeplitz matrix, b0 of the first step; b1 lies eight further, the
// next step sixteen.
__device__ __forceinline__ int tap_of_lane(int lane, int width) {
    const int column = lane / 4, u = 2 * (lane % 4) + 7 - column;
    return u % 2 == 0 ? u : width + u - 1;
}

// The taps of one channel and level, by a warp. T[i][j] = w[i - j - shift], and u = i - j + 7. A channel beyond C has
// zeros.
template <typename T>
__device__ __forceinline__ void write_taps(T* to, const T* from, int kh, int kw, int steps, bool exists, int lane) {
    const int width = toeplitz_tap_width(steps), shift = 8 * steps - 4 - kw / 2;
    for (int u = lane; u < width; u += kWarp) {
        const int tap = u - 7 - shift;
        const bool inside = exists && static_cast<unsigned>(tap) < static_cast<unsigned>(kw);
#pragma unroll 4
        for (int ky = 0; ky < kh; ++ky) {
            const T value = inside ? from[ky * kw + tap] : from_float<T>(0.0f);
            T* row = to + ky * 2 * width;
            row[u] = value;
            // The second copy starts at the first's element 1; its last element is nobody's.
            row[width + (u > 0 ? u - 1 : width - 1)] = u > 0 ? value : from_float<T>(0.0f);
        }
    }
}

// COUNT fragments of sixteen rows and eight columns, side by side. `rows`: the lane's row of ldmatrix.
template <bool TRANSPOSED, int COUNT>
__device__ __forceinline__ void load_fragments(uint32_t (&a)[COUNT][2], SharedAddress rows) {
#pragma unroll
    for (int i = 0; i + 1 < COUNT; i += 2)
        ldmatrix_x4<TRANSPOSED>(a[i][0], a[i][1], a[i + 1][0], a[i + 1][1], rows + 16 * i);
    if constexpr (COUNT % 2 == 1) ldmatrix_x2<TRANSPOSED>(a[COUNT - 1][0], a[COUNT - 1][1], rows + 16 * (COUNT - 1));
}

// Sixteen rows of BLOCKS blocks of outputs. `rows`: the lane's row of ldmatrix, at the first kernel row and the first
// column of input; `taps`: the lane's.
template <typename T, int BLOCKS, int STEPS>
__device__ __forceinline__ void convolve_tile(float (&sum)[BLOCKS][4], SharedAddress rows, int row_bytes,
                                              const T* taps, int kh) {
    constexpr int kWidth = 16 * STEPS + 8;
#pragma unroll 1
    for (int ky = 0; ky < kh; ++ky) {
        uint32_t b[STEPS][2], a[BLOCKS + 2 * STEPS - 1][2];
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            b[s][0] = load_word(taps + 16 * s);
            b[s][1] = load_word(taps + 16 * s + 8);
        }
        load_fragments<false>(a, rows);
#pragma unroll
        for (int half = 0; half < 2 * STEPS; ++half)
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j)
                mma_half<T>(sum[j], a[j + half][0], a[j + half][1], b[half / 2][half % 2]);
        rows += row_bytes;
        taps += 2 * kWidth;
    }
}

// Zeros, 16 bytes a thread; `elements` is a multiple of 8.
template <typename T>
__device__ __forceinline__ void zero(T* to, int elements, int thread, int threads) {
    uint4* words = reinterpret_cast<uint4*>(to);
    for (int i = thread; i < elements / 8; i += threads) words[i] = uint4{0, 0, 0, 0};
}

// N channels of a position, as they lie.
template <int N, typename T>
__device__ __forceinline__ void load_raw(const T* from, T (&to)[N]) {
    using Raw = typename RawOf<N * sizeof(T)>::type;
    const Raw raw = *reinterpret_cast<const Raw*>(from);
    memcpy(to, &raw, sizeof raw);
}

template <int N, typename T>
__device__ __forceinline__ void store_raw(T* to, const T (&from)[N]) {
    typename RawOf<N * sizeof(T)>::type raw;
    memcpy(&raw, from, sizeof raw);
    *reinterpret_cast<decltype(raw)*>(to) = raw;
}

// Calls f(row, column, c) for every row, every second column and every N-th of block_c channels.
template <int N, typename F>
__device__ __forceinline__ void for_each_two_columns(int rows, int columns, int block_c, F f) {
    for_each_vector<N>(Region{0, rows, 0, (columns + 1) / 2}, block_c, [&](int y, int x, int c) { f(y, 2 * x, c); });
}

// Channels-last -> planar: two neighbouring columns of N channels become N words. `at` is the map's position of the
// first row and column; planes lie `plane` elements apart, and `first` points to the first row and column of the
// first.
template <typename T, int N>
__device__ __forceinline__ void fill_planes(T* first, int plane, const Rows& rows, int count, int columns, int block_c,
                                            const T* at, const Map& map, int channels) {
    for_each_two_columns<N>(count, columns, block_c, [&](int row, int x, int c) {
        T left[N] = {}, right[N] = {};
        if (c < channels) {
            const int image = rows.image(row);
            const T* from =
                at + image * map.stride_b + (row - image * rows.held) * map.stride_h + x * map.stride_w + c;
            load_raw<N>(from, left);
            if (x + 1 < columns) load_raw<N>(from + map.stride_w, right);
        }
        T* to = first + c * plane + rows.offset(row) + x;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const T both[] = {left[k], right[k]};
            uint32_t word;
            memcpy(&word, both, sizeof word);
            *reinterpret_cast<uint32_t*>(to + k * plane) = word;
        }
    });
}

}  // namespace focalnet::cuda
