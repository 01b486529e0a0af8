// Channels last to planar maps (toeplitz.h) and back, for backward on whole maps (toeplitz_bwd.cu) where a block's
// channels fill little of a sector of 32 bytes.
//
// A warp takes 32 channels of N times eight columns of one image, a thread N of the channels and eight columns of a
// row: N vectors of eight columns on the planar side, eight vectors of N channels on the other. They change places in
// registers. All its loads are in flight at once, and both sides are whole sectors where N is eight:
//
//     channels last    four threads have 64 bytes of a position
//     planar           eight threads have 128 bytes of a channel: rows follow each other without a gap
//
// Bytes: every map read once and written once.

#include "gated_aggregation_bwd.cuh"
#include "launch.cuh"
#include "toeplitz.cuh"

namespace focalnet::cuda {
namespace {

constexpr int kTurnThreads = 256, kTurnWarps = kTurnThreads / kWarp;
constexpr int kColumns = 8;    // of a thread
constexpr int kChannels = 32;  // of a warp

struct TurnParams {
    int64_t B;
    int H, W, C;
    int planar, blocks_of_image;
    TurnedMap map[2];
};

// What a thread turns: columns x, x + 1, ... of row y, channels c, c + 1, ...
template <int N>
struct TurnPlace {
    int64_t image;
    int y, x, c;
    bool second, exists;  // of the maps; within it

    __device__ __forceinline__ explicit TurnPlace(const TurnParams& p) {
        constexpr int kAcross = kChannels / N;
        const int lane = threadIdx.x % kWarp, across = (p.C + kChannels - 1) / kChannels;
        const int64_t plane = blockIdx.x / p.blocks_of_image;
        second = plane >= p.B;
        image = second ? plane - p.B : plane;
        const int tile = static_cast<int>(blockIdx.x % p.blocks_of_image) * kTurnWarps + threadIdx.x / kWarp;
        const int row_chunks = p.planar / kColumns, chunk = tile / across * N + lane / kAcross;
        c = tile % across * kChannels + lane % kAcross * N;
        y = chunk / row_chunks;
        x = (chunk - y * row_chunks) * kColumns;
        exists = y < p.H && c < p.C;
    }
    __device__ __forceinline__ int64_t step(const TurnParams& p) const {
        return second ? p.map[1].last.stride_w : p.map[0].last.stride_w;
    }
    template <typename T>
    __device__ __forceinline__ T* channels_last(const TurnParams& p) const {
        void* data = second ? p.map[1].last.data : p.map[0].last.data;
        const int64_t stride_b = second ? p.map[1].last.stride_b : p.map[0].last.stride_b;
        const int64_t stride_h = second ? p.map[1].last.stride_h : p.map[0].last.stride_h;
        return static_cast<T*>(data) + image * stride_b + y * stride_h + x * step(p) + c;
    }
    template <typename T>
    __device__ __forceinline__ T* planar(const TurnParams& p) const {
        void* data = second ? p.map[1].planar : p.map[0].planar;
        return static_cast<T*>(data) + ((c * p.B + image) * p.H + y) * p.planar + x;
    }
};

template <typename T, int N>
__global__ void __launch_bounds__(kTurnThreads) to_planar_kernel(const TurnParams p) {
    const TurnPlace<N> at(p);
    if (!at.exists) return;
    const T* from = at.template channels_last<T>(p);
    const int64_t step = at.step(p);
    T values[kColumns][N] = {};
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
        if (at.x + i < p.W) load_raw<N>(from + i * step, values[i]);
    T* to = at.template planar<T>(p);
#pragma unroll
    for (int k = 0; k < N; ++k) {
        T row[kColumns];
#pragma unroll
        for (int i = 0; i < kColumns; ++i) row[i] = values[i][k];
        store_raw<kColumns>(to + k * p.B * p.H * p.planar, row);
    }
}

template <typename T, int N>
__global__ void __launch_bounds__(kTurnThreads) from_planar_kernel(const TurnParams p) {
    const TurnPlace<N> at(p);
    if (!at.exists) return;
    const T* from = at.template planar<T>(p);
    T rows[N][kColumns];
#pragma unroll
    for (int k = 0; k < N; ++k) load_raw<kColumns>(from + k * p.B * p.H * p.planar, rows[k]);
    T* to = at.template channels_last<T>(p);
    const int64_t step = at.step(p);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        T values[N];
#pragma unroll
        for (int k = 0; k < N; ++k) values[k] = rows[k][i];
        if (at.x + i < p.W) store_raw<N>(to + i * step, values);
    }
}

template <typename T, int N>
Status launch_turn(TurnParams params, int maps, bool back, cudaStream_t stream) {
    const int chunks = params.H * (params.planar / kColumns);
    const int tiles = blocks_for(chunks, N) * blocks_for(params.C, kChannels);
    params.blocks_of_image = blocks_for(tiles, kTurnWarps);
    const int64_t blocks = maps * params.B * params.blocks_of_image;
    if (back) return launch("from_planar_kernel", from_planar_kernel<T, N>, blocks, kTurnThreads, 0, stream, params);
    return launch("to_planar_kernel", to_planar_kernel<T, N>, blocks, kTurnThreads, 0, stream, params);
}

}  // namespace

template <typename T>
Status turn_maps(const Problem& p, const TurnedMap* maps, int count, bool back, cudaStream_t stream) {
    if (count == 0) return {};
    TurnParams params{p.B, p.H, p.W, p.C, planar_pitch(p.W), 0, {maps[0], maps[count - 1]}};
    switch (widest_vector(p.element, p.C, {maps[0].last, maps[count - 1].last})) {
        case 8:
            return launch_turn<T, 8>(params, count, back, stream);
        case 4:
            return launch_turn<T, 4>(params, count, back, stream);
        default:
            return launch_turn<T, 1>(params, count, back, stream);
    }
}

template Status turn_maps<__half>(const Problem&, const TurnedMap*, int, bool, cudaStream_t);
template Status turn_maps<__nv_bfloat16>(const Problem&, const TurnedMap*, int, bool, cudaStream_t);

}  // namespace focalnet::cuda
