// What blocks left for others to add up: partials in float32, summed in a fixed order and rounded once.
//
//     sum_partials_kernel    the weights' gradients of all levels, or the bias's: [parts][taps][C] -> (C, taps)
//     sum_dgates_kernel      the gates' gradients, of every block of channels
//
// Both wait for memory. Every thread therefore has several loads in flight before it adds the first; those beyond
// the last part are zero. Bytes: every partial read once.

#include "gated_aggregation_bwd.cuh"
#include "launch.cuh"
#include "toeplitz.h"

namespace focalnet::cuda {
namespace {

constexpr int kFew = 4;
constexpr int64_t kManySums = 4096;            // of vectors: sixteen a block, two blocks for every multiprocessor
constexpr int kSumRows = 32, kSumVectors = 4;  // of a block of sum_partials_kernel
constexpr int kSumThreads = kSumRows * kSumVectors;
constexpr int kFewestGateThreads = 64;

template <int N>
using Floats = typename RawOf<N * sizeof(float)>::type;

// sum += the first `count` of AT_ONCE vectors, `stride` floats apart.
template <int N, int AT_ONCE>
__device__ __forceinline__ void add_at_once(const float* from, int64_t stride, int count, float (&sum)[N]) {
    Floats<N> raw[AT_ONCE] = {};
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
        if (i < count) raw[i] = *reinterpret_cast<const Floats<N>*>(from + i * stride);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
        float values[N];
        memcpy(values, &raw[i], sizeof values);
#pragma unroll
        for (int k = 0; k < N; ++k) sum[k] += values[k];
    }
}

// sum += `count` vectors, in order.
template <int N>
__device__ __forceinline__ void add_up(const float* from, int64_t stride, int count, float (&sum)[N]) {
    constexpr int kAtOnce = N == 1 ? 8 : kFew;  // of vectors no more fit the registers of a full multiprocessor
    for (; count > kFew; count -= kAtOnce, from += kAtOnce * stride) add_at_once<N, kAtOnce>(from, stride, count, sum);
    if (count > 0) add_at_once<N, kFew>(from, stride, count, sum);
}

struct SummedLevel {
    Partials given;
    int first_block;
};

struct SumParams {
    SummedLevel level[kMaxLevels];
    int levels, C, columns;  // columns: blocks of a tap
};

// A block owns a tap and kSumVectors vectors of N channels. Its rows of threads take every kSumRows-th part; the first
// row adds up the others in order.
template <typename T, int N>
__global__ void __launch_bounds__(kSumThreads) sum_partials_kernel(const SumParams p) {
    __shared__ float sums[kSumRows][kSumVectors * N];
    int level = 0;
    while (level + 1 < p.levels && static_cast<int>(blockIdx.x) >= p.level[level + 1].first_block) ++level;
    const Partials& given = p.level[level].given;
    const int block = static_cast<int>(blockIdx.x) - p.level[level].first_block, tap = block / p.columns;
    const int row = threadIdx.x / kSumVectors, place = threadIdx.x % kSumVectors * N;
    const int c = (block - tap * p.columns) * kSumVectors * N + place;
    float sum[N] = {};
    if (c < p.C)
        add_up<N>(given.data + (static_cast<int64_t>(row) * given.taps + tap) * p.C + c,
                  static_cast<int64_t>(kSumRows) * given.taps * p.C, (given.parts + kSumRows - 1 - row) / kSumRows,
                  sum);
#pragma unroll
    for (int k = 0; k < N; ++k) sums[row][place + k] = sum[k];
    __syncthreads();
    if (row > 0 || c >= p.C) return;
    for (int i = 1; i < kSumRows; ++i)
#pragma unroll
        for (int k = 0; k < N; ++k) sum[k] += sums[i][place + k];
#pragma unroll
    for (int k = 0; k < N; ++k)
        static_cast<T*>(given.sum)[static_cast<int64_t>(c + k) * given.taps + tap] = from_float<T>(sum[k]);
}

// Where the partials of sum_dgates_kernel lie: [blocks][B * H * W][gates], or planar, [blocks][B][gates][H * W].
struct DgatesPartials {
    const float* data;
    int64_t count;  // of a block
    int blocks, positions, gates;
    bool planar;
};

// A thread owns a gate of a position, a block of threads `together` positions of one image, and each adds up in a
// fixed order. Rows of dgates are `pitch` elements apart.
template <typename T>
__global__ void sum_dgates_kernel(const DgatesPartials p, T* dgates, int64_t pitch, int blocks_of_image, int together,
                                  Division by_gates, float scale) {
    const unsigned of_image = blockIdx.x / blocks_of_image;
    const int64_t image = of_image;
    const int in_block = by_gates(threadIdx.x), gate = static_cast<int>(threadIdx.x) - in_block * p.gates;
    const int position = static_cast<int>(blockIdx.x - of_image * blocks_of_image) * together + in_block;
    if (position >= p.positions) return;
    const float* at = p.data + image * p.positions * p.gates +
                      (p.planar ? gate * static_cast<int64_t>(p.positions) + position
                                : static_cast<int64_t>(position) * p.gates + gate);
    float sum[1] = {};
    add_up<1>(at, p.count, p.blocks, sum);
    dgates[(image * p.positions + position) * pitch + gate] = from_float<T>(scale * sum[0]);
}

template <typename T, int N>
Status run(SumParams& params, const Partials* partials, int count, int C, cudaStream_t stream) {
    params.levels = count;
    params.C = C;
    params.columns = blocks_for(C, kSumVectors * N);
    int64_t blocks = 0;
    for (int i = 0; i < count; ++i) {
        params.level[i] = {partials[i], static_cast<int>(blocks)};
        blocks += static_cast<int64_t>(partials[i].taps) * params.columns;
    }
    if (blocks == 0) return {};
    return launch("sum_partials_kernel", sum_partials_kernel<T, N>, blocks, kSumThreads, 0, stream, params);
}

}  // namespace

template <typename T>
Status sum_partials(const Partials* partials, int count, int C, cudaStream_t stream) {
    SumParams params{};
    int64_t sums = 0;
    for (int i = 0; i < count; ++i) sums += static_cast<int64_t>(partials[i].taps) * C;
    return C % 4 == 0 && sums >= kManySums ? run<T, 4>(params, partials, count, C, stream)
                                           : run<T, 1>(params, partials, count, C, stream);
}

template <typename T>
Status sum_dgates(const Problem& p, const float* partials, int blocks, const Map& dgates, cudaStream_t stream,
                  bool planar) {
    const int positions = p.H * p.W, gates = p.L + 1;
    const auto together = [&](int threads) { return threads / gates; };
    const auto grid = [&](int threads) { return p.B * blocks_for(positions, together(threads)); };
    // Two blocks for every multiprocessor.
    int threads = kThreads;
    while (threads > kFewestGateThreads && grid(threads) < 2 * p.limits.multiprocessors) threads /= 2;
    const DgatesPartials given{partials, p.B * positions * gates, blocks, positions, gates, planar};
    return launch("sum_dgates_kernel", sum_dgates_kernel<T>, grid(threads), together(threads) * gates, 0, stream,
                  given, static_cast<T*>(dgates.data), dgates.stride_w, blocks_for(positions, together(threads)),
                  together(threads), Division(gates), p.scale);
}

#define FOCALNET_INSTANTIATE(T)                                               \
    template Status sum_partials<T>(const Partials*, int, int, cudaStream_t); \
    template Status sum_dgates<T>(const Problem&, const float*, int, const Map&, cudaStream_t, bool);
FOCALNET_INSTANTIATE(float)
FOCALNET_INSTANTIATE(__half)
FOCALNET_INSTANTIATE(__nv_bfloat16)

}  // namespace focalnet::cuda
