// The weight gradient of a depthwise convolution on tensor cores, from two planes of one channel in shared memory
// (toeplitz.cuh): the convolution's input, and the gradient dz of its output. With X a column of the input
//
//     D[r, s][n] += dz[y + r][X - s + kw / 2] * input[y - kh / 2 + n][X]      over all X and every R-th row y
//
// is a product whose inner axis is X, sixteen of them a mma; dw[ky][kx] = sum of D[r, kx][ky + r] over the R rows. B
// are rows of the input as they lie, ldmatrix of two times eight rows. A is a Toeplitz matrix of dz: shifts of 0 to 3
// of four rows where the kernel has up to four columns, of 0 to 7 of two rows, or of 0 to 15 of one. The two columns
// of dz in a register are neighbours; those that start at an odd column a warp copies for its rows, a column further:
//
//     odd     [8 rows][pitch]: column x of the map lies at kOddPadding + x, an odd number
//
// Four sums a lane, or eight for kernels of more rows: nothing is added up before all rows and images are in.

#pragma once

#include "toeplitz_bwd.cuh"

namespace focalnet::cuda {

// What a lane needs to know of a level, in elements.
struct Correlation {
    int together;  // rows of dz: R
    bool wide;     // more rows of the input than eight
    bool odd[2];   // of the lane's rows lane / 4 and lane / 4 + 8 of A: where they are read,
    int a[2];      // from the strip's first row and column,
    int step[2];   // and the next rows that are taken together
    int b;         // of ldmatrix, from the strip's first row and column of the input
    int further;   // the other eight rows

    __device__ __forceinline__ Correlation(int kh, int kw, int pitch, int odd_pitch, int lane) {
        constexpr int kBefore = 4;  // columns before the first; there ldmatrix finds 16 bytes
        const int bits = toeplitz_shift_bits(kw);
        together = kMmaM >> bits;
        wide = toeplitz_wide(kh, kw);
        int input_row[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int m = lane / 4 + 8 * i, n = lane % 8 + 8 * i;
            const int row = m >> bits, column = 2 * (lane % 4) + kw / 2 - (m & ((1 << bits) - 1)) - kBefore;
            odd[i] = column % 2 != 0;
            const int own = odd[i] ? odd_pitch : pitch;
            a[i] = row * own + column;
            step[i] = together * own;
            // A row that no tap meets is read as the eight's first: no conflict of banks.
            input_row[i] = (n < kh + together - 1 ? n : 8 * i) - kh / 2;
        }
        b = input_row[0] * pitch + 8 * (lane / 8) - kBefore;
        further = (input_row[1] - input_row[0]) * pitch;
    }
};

// Eight rows of a strip, one column further, by a warp; zero where no row exists. `dz` points to the lane's row,
// column 2 (lane % 4).
template <int BLOCKS, typename T>
__device__ __forceinline__ void copy_odd(T* odd, const T* dz, bool exists, int groups) {
    for (int group = 0; group < groups; ++group) {
        T pairs[BLOCKS][2] = {};
        if (exists)
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j) load_raw<2>(dz + 8 * j, pairs[j]);
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j) {
            odd[8 * j] = pairs[j][0];
            odd[8 * j + 1] = pairs[j][1];
        }
        dz += 8 * BLOCKS;
        odd += 8 * BLOCKS;
    }
}

// PIECES times eight columns of the input against dz. `first`, `second`: where the lane's two rows of A begin.
template <int PIECES, typename T>
__device__ __forceinline__ void correlate_columns(float (&sum)[4], SharedAddress input, const T* first,
                                                  const T* second) {
#pragma unroll
    for (int p = 0; p < PIECES; p += 4) {
        uint32_t b[4];
        if (PIECES - p > 2)
            ldmatrix_x4<false>(b[0], b[1], b[2], b[3], input + 16 * p);
        else
            ldmatrix_x2<false>(b[0], b[1], input + 16 * p);
#pragma unroll
        for (int q = 0; q < 4 && p + q < PIECES; q += 2) {
            const int at = 8 * (p + q);
            const uint32_t a0 = load_word(first + at), a1 = load_word(second + at);
            if (p + q + 1 < PIECES)
                mma<T>(sum, a0, a1, load_word(first + at + 8), load_word(second + at + 8), b[q], b[q + 1]);
            else
                mma_half<T>(sum, a0, a1, b[q]);
        }
    }
}

// D += the share of a strip, by a warp whose `odd` holds its rows. `dz` and `input` point to the strip's first row and
// column. The rows of dz below the last one are zero, as many as are taken together less one.
template <int BLOCKS, typename T>
__device__ __forceinline__ void correlate_strip(float (&sum)[2][4], const Correlation& own, const T* dz,
                                                SharedAddress input, const T* odd, int pitch, int rows, int groups) {
    constexpr int kSize = sizeof(T);
    const T *first = (own.odd[0] ? odd : dz) + own.a[0], *second = (own.odd[1] ? odd : dz) + own.a[1];
    for (int y = 0; y < rows; y += own.together) {
        const auto columns = [&](auto pieces, int at) {
            constexpr int kPieces = decltype(pieces)::value;
            const SharedAddress from = input + static_cast<SharedAddress>(at * kSize);
            correlate_columns<kPieces>(sum[0], from, first + at, second + at);
            if (own.wide)
                correlate_columns<kPieces>(sum[1], from + static_cast<SharedAddress>(own.further * kSize), first + at,
                                           second + at);
        };
        for (int group = 0; group + 1 < groups; ++group)
            columns(std::integral_constant<int, BLOCKS>{}, 8 * BLOCKS * group);
        columns(std::integral_constant<int, BLOCKS + 1>{}, 8 * BLOCKS * (groups - 1));
        input += static_cast<SharedAddress>(own.together * pitch * kSize);
        first += own.step[0];
        second += own.step[1];
    }
}

// D of all channels, a warp its own share of each: the sums lie in `products`, [block_c][sharers][1 or 2][16][8].
template <int BLOCKS, typename T, typename Block, typename DzOf, typename InputOf>
__device__ __forceinline__ void correlate(const Block& b, DzOf dz_of, InputOf input_of, int kh, int kw) {
    const auto& t = b.p.tiling;
    const Strips& strips = b.strips;
    const int lane = b.at.lane;
    const Correlation own(kh, kw, t.pitch, t.odd_pitch, lane);
    T* odd = b.odd + b.at.warp * 8 * t.odd_pitch + kToeplitzOddPadding;
    T* odd_of_lane = odd + lane / 4 * t.odd_pitch + 2 * (lane % 4);
    const int dz_of_lane = lane / 4 * t.pitch + 2 * (lane % 4);
    for_each_channel(b, [&](int c) {
        float sum[2][4] = {};
        const T* dz = dz_of(c);
        const SharedAddress input = shared_address(input_of(c) + own.b);
        for (int strip = b.at.share; strip < strips.count; strip += t.sharers) {
            const StripRow top = strips.row(strip, 0);
            const int offset = strips.offset(top), rows = min(8, strips.held - top.y);
            __syncwarp();  // nobody reads the rows that were copied last
            copy_odd<BLOCKS>(odd_of_lane, dz + offset + dz_of_lane, lane / 4 < rows, t.groups);
            __syncwarp();
            correlate_strip<BLOCKS>(sum, own, dz + offset,
                                    input + static_cast<SharedAddress>(offset * static_cast<int>(sizeof(T))), odd,
                                    t.pitch, rows, t.groups);
        }
        float* to = b.products + (c * t.sharers + b.at.share) * t.product + lane / 4 * 8 + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (n == 0 || own.wide)
                    store_pair(to + 128 * n + 64 * half, float2{sum[n][2 * half], sum[n][2 * half + 1]});
    });
}

// What the warps left in `products`, added up in a fixed order: dweights[tap][C]. A warp takes 32 / block_c taps of
// all channels at a time.
template <typename Block>
__device__ __forceinline__ void sum_products(const Block& b, float* dweights, int kh, int kw, const Division& by_kw) {
    const auto& t = b.p.tiling;
    const int bits = toeplitz_shift_bits(kw), together = kMmaM >> bits, taps = kh * kw;
    const int c = threadIdx.x & (t.block_c - 1), step = blockDim.x >> t.channel_bits;
    if (b.first_c + c >= b.p.C) return;
    for (int tap = threadIdx.x >> t.channel_bits; tap < taps; tap += step) {
        const int ky = by_kw(tap), kx = tap - ky * kw;
        float sum = 0.0f;
        const float* product = b.products + c * t.sharers * t.product;
        for (int share = 0; share < t.sharers; ++share, product += t.product)
            for (int r = 0; r < together; ++r) {
                const int n = ky + r;
                sum += product[n / 8 * 128 + ((r << bits) + kx) * 8 + n % 8];
            }
        dweights[tap * b.p.C + b.first_c + c] = sum;
    }
}

}  // namespace focalnet::cuda
