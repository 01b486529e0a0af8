// What surrounds the modulator's matrix products, which cuBLAS computes: products of two maps, row by row.
//
//     forward    out = modulator * q                                      modulate_kernel, in place of the modulator
//     backward   dmodulator = dout * q, and its sum over the rows         modulate_kernel with SUMS
//                dbias                                                    sum_partials_kernel (partial_sums.cu)
//                dq = dout * modulator                                    modulate_kernel
//
// A block owns rows_of_block rows and `columns` vectors of N channels. A thread keeps its column, so its sums stay in
// registers:
//
//     row r        thread 0         1             ...  columns - 1
//     row r + 1    thread columns   columns + 1   ...
//     ...          as many rows at once as 256 threads have columns for, and kAtOnce times that many in flight
//
// Without sums there is a block for every kAtOnce such steps, and the device takes the next block when one is done.
// With sums there are as many blocks as run at once, each with the same number of rows; they leave partials
// [parts][C]. Bytes: two maps read, one written. q is part of the packed projection and dq of its gradient, so every
// operand has a pitch of its own.

#include "gated_aggregation_bwd.cuh"
#include "launch.cuh"
#include "modulate.h"

namespace focalnet::cuda {
namespace {

constexpr int kAtOnce = 4;              // vectors of each factor that a thread has in flight
constexpr int kAtOnceWithSums = 2;      // the sums need registers
constexpr int kBlocksPerProcessor = 4;  // of 256 threads, with 64 registers each

struct ModulateParams {
    Rows a, b, out;
    int64_t rows, rows_of_block;
    int C, columns, column_blocks;
    float* partials;  // [parts][C], with SUMS
};

// Adds up the threads of each column, the second half of the rows to the first until one is left.
template <int N>
__device__ __forceinline__ void store_sums(const ModulateParams& p, float* shared, const float (&sum)[N], int rows,
                                           int64_t part, int64_t c) {
    const int row = threadIdx.x / p.columns;
    float* mine = shared + threadIdx.x;
#pragma unroll
    for (int k = 0; k < N; ++k) mine[k * kThreads] = sum[k];
    for (int held = rows; held > 1; held = (held + 1) / 2) {
        const int half = (held + 1) / 2;
        __syncthreads();
        if (row + half < held)
#pragma unroll
            for (int k = 0; k < N; ++k) mine[k * kThreads] += mine[k * kThreads + half * p.columns];
    }
    if (row > 0 || c >= p.C) return;
#pragma unroll
    for (int k = 0; k < N; ++k) p.partials[part * p.C + c + k] = mine[k * kThreads];
}

template <typename T, int N, bool SUMS>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) modulate_kernel(const ModulateParams p) {
    __shared__ float shared[SUMS ? kThreads * N : 1];
    const int rows = blockDim.x / p.columns, column = threadIdx.x % p.columns;
    const int64_t first_c = static_cast<int64_t>(blockIdx.x % p.column_blocks) * p.columns * N;
    const int64_t part = blockIdx.x / p.column_blocks, c = first_c + column * N;
    const int64_t end = min(p.rows, (part + 1) * p.rows_of_block);
    int64_t row = part * p.rows_of_block + threadIdx.x / p.columns;
    const T* a = static_cast<const T*>(p.a.data) + row * p.a.pitch + c;
    const T* b = static_cast<const T*>(p.b.data) + row * p.b.pitch + c;
    T* out = static_cast<T*>(p.out.data) + row * p.out.pitch + c;
    const int64_t step_a = rows * p.a.pitch, step_b = rows * p.b.pitch, step_out = rows * p.out.pitch;
    constexpr int kDepth = SUMS ? kAtOnceWithSums : kAtOnce;
    float sum[N] = {};
    for (; c < p.C && row < end; row += kDepth * rows) {
        // All loads come first: `out` may be a or b, so the compiler cannot move one across a store.
        typename Vector<T, N>::Raw raw_a[kDepth] = {}, raw_b[kDepth] = {};
#pragma unroll
        for (int i = 0; i < kDepth; ++i)
            if (row + i * rows < end) {
                raw_a[i] = Vector<T, N>::read(a + i * step_a);
                raw_b[i] = Vector<T, N>::read(b + i * step_b);
            }
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            float x[N], y[N];
            Vector<T, N>::unpack(raw_a[i], x);
            Vector<T, N>::unpack(raw_b[i], y);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                x[k] *= y[k];
                if constexpr (SUMS) sum[k] += x[k];  // of a row beyond the end: zero
            }
            if (row + i * rows < end) Vector<T, N>::store(out + i * step_out, x);
        }
        a += kDepth * step_a;
        b += kDepth * step_b;
        out += kDepth * step_out;
    }
    if constexpr (SUMS) store_sums<N>(p, shared, sum, rows, part, c);
}

// How a launch cuts the rows.
struct Cut {
    int width, columns, column_blocks, rows;  // channels of a vector; vectors and rows of a block's one step
    int64_t rows_of_block, parts;

    Cut(const RowsProblem& p, const Rows& a, const Rows& b, const Rows& out, bool sums) {
        const auto map = [](const Rows& r) { return Map{r.data, r.pitch, r.pitch, r.pitch}; };
        width = widest_vector(p.element, p.C, {map(a), map(b), map(out)});
        const int vectors = p.C / width;
        column_blocks = blocks_for(vectors, kThreads);
        columns = blocks_for(vectors, column_blocks);
        rows = kThreads / columns;
        const int64_t steps = (p.rows + rows - 1) / rows;
        const int64_t most = std::max(1, kBlocksPerProcessor * p.multiprocessors / column_blocks);
        const int64_t even = (steps + most - 1) / most;  // steps of a block if all blocks run at once
        rows_of_block = sums ? (p.rows + most - 1) / most : std::min<int64_t>(even, kAtOnce) * rows;
        if (sums) rows_of_block = std::max<int64_t>(rows_of_block, rows);
        parts = (p.rows + rows_of_block - 1) / rows_of_block;
    }
};

template <typename T, bool SUMS>
Status run(const Cut& cut, const ModulateParams& params, cudaStream_t stream) {
    const auto kernel = cut.width == 1   ? modulate_kernel<T, 1, SUMS>
                        : cut.width == 4 ? modulate_kernel<T, 4, SUMS>
                                         : modulate_kernel<T, 16 / sizeof(T), SUMS>;
    return launch("modulate_kernel", kernel, cut.parts * cut.column_blocks, cut.columns * cut.rows, 0, stream, params);
}

ModulateParams params_of(const RowsProblem& p, const Cut& cut, const Rows& a, const Rows& b, const Rows& out,
                         void* scratch) {
    return {a, b, out, p.rows, cut.rows_of_block, p.C, cut.columns, cut.column_blocks, static_cast<float*>(scratch)};
}

}  // namespace

Status modulate(const RowsProblem& p, const Rows& a, const Rows& b, const Rows& out, cudaStream_t stream) {
    if (p.rows == 0) return {};
    const Cut cut(p, a, b, out, false);
    const ModulateParams params = params_of(p, cut, a, b, out, nullptr);
    return with_element(p.element, [&](auto element) { return run<decltype(element), false>(cut, params, stream); });
}

size_t modulate_and_sum_scratch_bytes(const RowsProblem& p) {
    const int64_t parts = std::min<int64_t>(p.rows, kBlocksPerProcessor * p.multiprocessors);
    return static_cast<size_t>(parts) * p.C * sizeof(float);
}

Status modulate_and_sum(const RowsProblem& p, const Rows& a, const Rows& b, const Rows& out, void* sum, void* scratch,
                        cudaStream_t stream) {
    return with_element(p.element, [&](auto element) -> Status {
        using T = decltype(element);
        const auto add_up = [&](int64_t parts) {
            const Partials partials{static_cast<const float*>(scratch), static_cast<int>(parts), 1, sum};
            return sum_partials<T>(&partials, 1, p.C, stream);
        };
        if (p.rows == 0) return add_up(0);
        const Cut cut(p, a, b, out, true);
        if (Status s = run<T, true>(cut, params_of(p, cut, a, b, out, scratch), stream)) return s;
        return add_up(cut.parts);
    });
}

}  // namespace focalnet::cuda
