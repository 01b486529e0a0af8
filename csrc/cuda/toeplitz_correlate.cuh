// The weight gradient of a depthwise convolution on tensor cores, from two planes of one channel in shared memory
// (toeplitz.cuh): the convolution's input, and the gradient dz of its output. Of kernel row ky, with eight columns of
// dz from x on and the 16 (or 32) columns of the input around them,
//
//     D[i][j] += input[y + ky - kh / 2][x + 4 - 8 * steps + i] * dz[y][x + j]      over all y and every eighth x
//
// is a product whose inner axis is rows, sixteen of them a mma; dw[ky][kx] is the sum of a diagonal of D, i - j fixed.
// Both come by ldmatrix as they lie, transposed. Its eight columns of dz start four before x, so a lane takes column j
// as (j + 4) % 8: the upper half of one matrix and the lower half of the next. The fragments of dz serve all kernel
// rows; those of the input, in pairs that overlap, cost four moves for every second block of columns.
//
// Four sums a lane, kernel row and step: nothing is added up before all rows and images are in.

#pragma once

#include "toeplitz_bwd.cuh"

namespace focalnet::cuda {

// Where a lane's rows of ldmatrix begin. Fragments of the input come in pairs, the two halves of a product's other
// axis in a row; `last`: one that has no partner.
struct CorrelatedRows {
    SharedAddress dz, input, last;
};

template <int COUNT>
__device__ __forceinline__ void load_pairs(uint32_t (&a)[COUNT][2], SharedAddress rows, SharedAddress last) {
#pragma unroll
    for (int i = 0; i + 1 < COUNT; i += 2)
        ldmatrix_x4<true>(a[i][0], a[i + 1][0], a[i][1], a[i + 1][1], rows + 16 * i);
    if constexpr (COUNT % 2 == 1) ldmatrix_x2<true>(a[COUNT - 1][0], a[COUNT - 1][1], last + 16 * (COUNT - 1));
}

// The share of a tile in D of ROWS kernel rows.
template <int BLOCKS, int STEPS, int ROWS, typename T>
__device__ __forceinline__ void correlate_tile(float (&sum)[ROWS][STEPS][4], CorrelatedRows at, int row_bytes,
                                               bool upper) {
    constexpr int kFragments = BLOCKS + 2 * STEPS - 1;
    uint32_t shifted[BLOCKS + 1][2], b[BLOCKS][2];
    load_fragments<true>(shifted, at.dz);
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) b[j][half] = upper ? shifted[j][half] : shifted[j + 1][half];
#pragma unroll
    for (int ky = 0; ky < ROWS; ++ky, at.input += row_bytes, at.last += row_bytes) {
        uint32_t a[kFragments][2];
        load_pairs(a, at.input, at.last);
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j)
                mma<T>(sum[ky][s], a[j + 2 * s][0], a[j + 2 * s + 1][0], a[j + 2 * s][1], a[j + 2 * s + 1][1], b[j][0],
                       b[j][1]);
    }
}

// Half of a diagonal's sum: a lane adds its two columns of D, and has E[i][t] for rows i = lane / 4 + 8 k; those that
// a tap needs it leaves in `to`, [ROWS][kw + 6][4]. Tap kx is the sum of E[kx + 2 t][t].
template <int STEPS, int ROWS>
__device__ __forceinline__ void store_diagonals(float* to, const float (&sum)[ROWS][STEPS][4], int kw, int lane) {
    const int rows = kw + 6, first = lane / 4 - (8 * STEPS - 4 - kw / 2), t = lane % 4 ^ 2;
#pragma unroll
    for (int ky = 0; ky < ROWS; ++ky, to += 4 * rows)
#pragma unroll
        for (int k = 0; k < 2 * STEPS; ++k) {
            // The next row's second column: another lane's, of the next eight rows where this lane has the last.
            const float own = sum[ky][k / 2][2 * (k % 2) + 1];
            const float next = k + 1 < 2 * STEPS ? sum[ky][(k + 1) / 2][2 * ((k + 1) % 2) + 1] : 0.0f;
            const float below = __shfl_sync(0xffffffffu, lane < 4 ? next : own, (lane + 4) % kWarp);
            const float both = sum[ky][k / 2][2 * (k % 2)] + below;
            const int row = first + 8 * k;
            if (static_cast<unsigned>(row) < static_cast<unsigned>(rows)) to[4 * row + t] = both;
        }
}

// D of ROWS kernel rows from `first` on, of all channels, a warp its own share of each.
template <int BLOCKS, int STEPS, int ROWS, typename T, typename Block, typename DzOf, typename InputOf>
__device__ __forceinline__ void correlate_rows(const Block& b, DzOf dz_of, InputOf input_of, int first, int kh,
                                               int kw) {
    constexpr int kSize = sizeof(T);
    const auto& t = b.p.tiling;
    const Strips& strips = b.strips;
    const int lane = b.at.lane, tiles = strips.tiles() * t.groups, quarter = lane / 8;
    const int from_input = 4 - 8 * STEPS + (first - kh / 2) * t.pitch;
    for_each_channel(b, [&](int c) {
        float sum[ROWS][STEPS][4] = {};
        const SharedAddress dz = shared_address(dz_of(c) + 8 * (quarter / 2) - 4);
        const SharedAddress input = shared_address(input_of(c) + from_input);
        for (int i = b.at.share; i < tiles; i += t.sharers) {
            const TilePlace place(i, t.groups, 8 * BLOCKS);
            const auto bytes = [&](int elements) {
                return static_cast<SharedAddress>((elements + place.column) * kSize);
            };
            const CorrelatedRows at{
                dz + bytes(strips.nearest_or_zero(place.strip + quarter % 2, lane % 8)),
                input + bytes(strips.nearest(place.strip + quarter / 2, lane % 8) + 8 * (quarter % 2)),
                input + bytes(strips.nearest(place.strip + quarter % 2, lane % 8))};
            correlate_tile<BLOCKS, STEPS, ROWS, T>(sum, at, t.pitch * kSize, lane >= 16);
        }
        store_diagonals(b.products + (c * t.sharers + b.at.share) * t.product + 4 * first * (kw + 6), sum, kw, lane);
    });
}

// What the warps find lies in `products` then, [block_c][sharers][product].
template <int BLOCKS, typename T, typename Block, typename DzOf, typename InputOf>
__device__ __forceinline__ void correlate(const Block& b, DzOf dz_of, InputOf input_of, int kh, int kw) {
    with_steps(kw, [&](auto steps) {
        constexpr int kSteps = decltype(steps)::value;
        for (int first = 0; first < kh;)
            with_rows_at_once<BLOCKS, kSteps>(kh - first, [&](auto rows) {
                constexpr int kRows = decltype(rows)::value;
                correlate_rows<BLOCKS, kSteps, kRows, T>(b, dz_of, input_of, first, kh, kw);
                first += kRows;
            });
    });
}

// What the warps left in `products`, added up in a fixed order: dweights[tap][C]. A warp takes 32 / block_c taps of
// all channels at a time.
template <typename Block>
__device__ __forceinline__ void sum_products(const Block& b, float* dweights, int kh, int kw, const Division& by_kw) {
    const auto& t = b.p.tiling;
    const int taps = kh * kw;
    const int c = threadIdx.x & (t.block_c - 1), step = blockDim.x >> t.channel_bits;
    if (b.first_c + c >= b.p.C) return;
    for (int tap = threadIdx.x >> t.channel_bits; tap < taps; tap += step) {
        float sum = 0.0f;
        const float* product = b.products + c * t.sharers * t.product + 4 * (tap + 6 * by_kw(tap));
        for (int share = 0; share < t.sharers; ++share, product += t.product)
#pragma unroll
            for (int column = 0; column < 4; ++column) sum += product[9 * column];
        dweights[tap * b.p.C + b.first_c + c] = sum;
    }
}

}  // namespace focalnet::cuda
