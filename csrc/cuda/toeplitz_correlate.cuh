// The weight gradient of a depthwise convolution on tensor cores, one row of the kernel, from two planes of one
// channel in shared memory (toeplitz.cuh): the convolution's input and the gradient dz of its output.
//
//     P[i][j] += dz[row][s + i] * input[row + ky - kh / 2][s - 8 + j]     over all rows, and over column tiles s
//
// is a product of 16 columns of dz by 32 columns of the input, sixteen rows at a time: per 16 x 16 of dz, three
// ldmatrix of four matrices (transposed, as rows are the inner axis) and four mma. All that the kernel's row asks for
// lies on a band of it, dw[t] = sum of P[i][i - kw / 2 + t + 8] over i, which is added up once, when all rows and
// columns are in.

#pragma once

#include "toeplitz.cuh"

namespace focalnet::cuda {

// By one warp; lane t < kw returns dw[t]. `dz` and `input` point to the first row and column, `input` moved by the
// kernel's row. Below the last row of dz is a row of zeros. Column tiles start where ldmatrix finds 16 bytes. What a
// tile reads before and beyond a row of the input is clamped, and meets columns of dz that are zero, or no band.
template <typename T>
__device__ __forceinline__ float correlate_row(const T* dz, const T* input, const Rows& rows, int count, int columns,
                                               int padding, int kw, float* band, int lane) {
    const int i = lane % 8, second = lane / 8 % 2, third = lane / 16;
    const int start = padding - kToeplitzPadding, end = padding + columns;
    dz -= padding;
    input -= padding;
    const T* nothing = dz + rows.offset(count - 1) + rows.pitch;  // for rows and columns of dz that do not exist
    float sum[4][4] = {};
    for (int first = 0; first < count; first += kMmaM) {
        const int a_row = first + i + 8 * third, b_row = min(first + i + 8 * second, count - 1);
        const T* a_from = a_row < count ? dz + rows.offset(a_row) : nothing;
        const T* b_from = input + rows.offset(b_row);
#pragma unroll 1
        for (int s = start; s < end; s += 16) {
            uint32_t a[4], b[4][2];
            const int a_column = s + 8 * second, b_column = s - 8 + 8 * third;
            ldmatrix_x4<true>(a[0], a[1], a[2], a[3],
                              shared_address(a_column < rows.pitch ? a_from + a_column : nothing));
            ldmatrix_x4<true>(b[0][0], b[0][1], b[1][0], b[1][1], shared_address(b_from + max(0, b_column)));
            ldmatrix_x4<true>(b[2][0], b[2][1], b[3][0], b[3][1],
                              shared_address(b_from + min(b_column + 16, rows.pitch - 8)));
#pragma unroll
            for (int n = 0; n < 4; ++n) mma<T>(sum[n], a[0], a[1], a[2], a[3], b[n][0], b[n][1]);
        }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k)
            band[(lane / 4 + k / 2 * 8) * kToeplitzBandPitch + 8 * n + 2 * (lane % 4) + k % 2] = sum[n][k];
    __syncwarp();
    float total = 0.0f;
    if (lane < kw)
        for (int column = 0; column < kMmaM; ++column)
            total += band[column * kToeplitzBandPitch + 8 + column - kw / 2 + lane];
    __syncwarp();
    return total;
}

}  // namespace focalnet::cuda
