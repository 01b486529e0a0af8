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
//     odd     [16 rows][pitch]: column x of the map lies at kOddPadding + x, an odd number
//
// Four sums a lane, or eight for kernels of more rows: nothing is added up before all rows and images are in.

#pragma once

#include "toeplitz_bwd.cuh"

namespace focalnet::cuda {

// What a lane needs to know of a level.
struct Correlation {
    int shifts, together;    // R
    bool wide;               // more rows of the input than eight
    int row[2], column[2];   // of dz, from y and X: of the lane's rows lane / 4 and lane / 4 + 8 of A
    bool odd[2];
    int input_row[2];        // of ldmatrix, from y; one that no tap meets is read as the eight's first

    __device__ __forceinline__ Correlation(int kh, int kw, int lane) {
        shifts = toeplitz_shifts(kw);
        together = kMmaM / shifts;
        wide = kh + together - 1 > 8;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int m = lane / 4 + 8 * i, n = lane % 8 + 8 * i;
            row[i] = m / shifts;
            column[i] = 2 * (lane % 4) + kw / 2 - m % shifts;
            odd[i] = column[i] % 2 != 0;
            input_row[i] = (n < kh + together - 1 ? n : 8 * i) - kh / 2;
        }
    }
};

// One column more than a plane's, sixteen rows: those of the strips `strip`, `strip` + 1, by a warp. Zero where no row
// exists. Words of odd columns lie where words may.
template <typename T>
__device__ __forceinline__ void copy_odd(T* odd, int odd_pitch, const T* dz, const Strips& strips, int strip,
                                         int columns, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const StripRow row = strips.row(strip + half, lane / 4);
        const T* from = dz + strips.offset(row) + 2 * (lane % 4);
        T* to = odd + (lane / 4 + 8 * half) * odd_pitch + kToeplitzOddPadding + 2 * (lane % 4);
        for (int x = 0; x < columns; x += 8) {
            T pair[2] = {};
            if (row.exists) load_raw<2>(from + x, pair);
            to[x] = pair[0];
            to[x + 1] = pair[1];
        }
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

// D += the share of the strips `strip`, `strip` + 1, by a warp whose `odd` holds their rows. `dz` and `input` point to
// the first row and column. The rows of dz below the last one are zero, as many as are taken together less one.
template <int BLOCKS, typename T>
__device__ __forceinline__ void correlate_strips(float (&sum)[2][4], const Correlation& own, const T* dz,
                                                 const T* input, const T* odd, int odd_pitch, const Strips& strips,
                                                 int strip, int groups, int lane) {
    constexpr int kBefore = 4;  // columns before the first; there ldmatrix finds 16 bytes
    const int pitch = strips.pitch;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
        const StripRow top = strips.row(strip + half, 0);
        if (!top.exists) return;
        const int offset = strips.offset(top) - kBefore, rows = min(8, strips.held - top.y);
        const T* a[2];
        int step[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            step[i] = own.together * (own.odd[i] ? odd_pitch : pitch);
            a[i] = own.odd[i] ? odd + (8 * half + own.row[i]) * odd_pitch + kToeplitzOddPadding - kBefore
                              : dz + offset + own.row[i] * pitch;
            a[i] += own.column[i];
        }
        const T* first_row = input + offset + 8 * (lane / 8);
        SharedAddress b = shared_address(first_row + own.input_row[0] * pitch);
        const int further = (own.input_row[1] - own.input_row[0]) * pitch * static_cast<int>(sizeof(T));
        for (int y = 0; y < rows; y += own.together) {
            const auto columns = [&](auto pieces, int at) {
                constexpr int kPieces = decltype(pieces)::value;
                const SharedAddress from = b + static_cast<SharedAddress>(at * static_cast<int>(sizeof(T)));
                correlate_columns<kPieces>(sum[0], from, a[0] + at, a[1] + at);
                if (own.wide) correlate_columns<kPieces>(sum[1], from + further, a[0] + at, a[1] + at);
            };
            for (int group = 0; group + 1 < groups; ++group)
                columns(std::integral_constant<int, BLOCKS>{}, 8 * BLOCKS * group);
            columns(std::integral_constant<int, BLOCKS + 1>{}, 8 * BLOCKS * (groups - 1));
            b += static_cast<SharedAddress>(own.together * pitch * static_cast<int>(sizeof(T)));
            a[0] += step[0];
            a[1] += step[1];
        }
    }
}

// D of all channels, a warp its own share of each: the sums lie in `products`, [block_c][sharers][2][16][8].
template <int BLOCKS, typename T, typename Block, typename DzOf, typename InputOf>
__device__ __forceinline__ void correlate(const Block& b, const Strips& strips, DzOf dz_of, InputOf input_of, int kh,
                                          int kw) {
    const auto& t = b.p.tiling;
    const Correlation own(kh, kw, b.lane);
    T* odd = b.odd + b.warp * kMmaM * t.odd_pitch;
    for_each_channel(b, [&](int c, int share) {
        float sum[2][4] = {};
        for (int i = share; i < strips.tiles(); i += t.sharers) {
            __syncwarp();  // nobody reads the rows that were copied last
            copy_odd(odd, t.odd_pitch, dz_of(c), strips, 2 * i, 8 * BLOCKS * t.groups, b.lane);
            __syncwarp();
            correlate_strips<BLOCKS>(sum, own, dz_of(c), input_of(c), odd, t.odd_pitch, strips, 2 * i, t.groups, b.lane);
        }
        float* to = b.products + (c * t.sharers + share) * kToeplitzProduct + b.lane / 4 * 8 + 2 * (b.lane % 4);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (n == 0 || own.wide)
                    store_pair(to + 128 * n + 64 * half, float2{sum[n][2 * half], sum[n][2 * half + 1]});
    });
}

// What the warps left in `products`, added up in a fixed order: dweights[tap][C], by all threads.
template <typename Block>
__device__ __forceinline__ void sum_products(const Block& b, float* dweights, int kh, int kw) {
    const auto& t = b.p.tiling;
    const int shifts = toeplitz_shifts(kw), together = kMmaM / shifts, channels = min(t.block_c, b.p.C - b.first_c);
    for (int i = threadIdx.x; i < t.block_c * kh * kw; i += blockDim.x) {
        const int c = i % t.block_c, tap = i / t.block_c, ky = tap / kw, kx = tap - ky * kw;
        if (c >= channels) continue;
        float sum = 0.0f;
        for (int share = 0; share < t.sharers; ++share) {
            const float* product = b.products + (c * t.sharers + share) * kToeplitzProduct;
            for (int r = 0; r < together; ++r) {
                const int n = ky + r;
                sum += product[n / 8 * 128 + (r * shifts + kx) * 8 + n % 8];
            }
        }
        dweights[tap * b.p.C + b.first_c + c] = sum;
    }
}

}  // namespace focalnet::cuda
