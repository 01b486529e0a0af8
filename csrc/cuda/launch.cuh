// From a problem to a launch: the chain's parameters, scratch, vector widths, the launch itself and its error.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "gated_aggregation.h"
#include "tile.cuh"

namespace focalnet::cuda {

struct ChainLevel {
    const void* weight;
    void* z;  // contiguous map that receives the convolution's result, or null
    int kh, kw, tap;
    int reach_y, reach_x;  // halo that the later levels of the launch want around the tile
};

struct ChainParams {
    int64_t B;
    int H, W, C;
    Map ctx, gates;
    void* agg;    // contiguous, or null: the levels only
    void* next;   // contiguous map that receives the last level, or null
    float* sums;  // [B][tiles][C], of the last level over each tile, or null
    int levels, first_gate, taps, reach_y, reach_x;
    ChainLevel level[kMaxLevels];
    Tiling tiling;
    int ctx_width, agg_width;  // channels of one access
    bool accumulates, adds_global;
    float scale;
};

// What a run of the chain writes; null or absent is not wanted.
struct ChainOutputs {
    void* agg;            // contiguous; without the global term, unless the plan takes whole maps
    void* z[kMaxLevels];  // contiguous
    float* sums;          // [B][tiles of the last group][C], of the last level
    void* between[2];     // contiguous: the levels on the way where there is more than one group, taking turns
};

inline int last_tiles(const ForwardPlan& plan) {
    const Tiling& last = plan.group[plan.groups - 1].tiling;
    return last.tiles_y * last.tiles_x;
}

template <typename T>
Status run_chain(const Problem& p, const ForwardPlan& plan, const ChainOutputs& outputs, cudaStream_t stream);

// global [B][C] = GELU(mean), from sums [B][tiles][C] of the last level.
Status form_global_context(const Problem& p, const float* sums, int tiles, float* global, cudaStream_t stream);

// agg += scale * gate * global; global is [B][C].
template <typename T>
Status add_global(const Problem& p, const Map& agg, const float* global, cudaStream_t stream);

// The largest number of channels that one access may take: a width that the kernels know (with_width), that divides C,
// and to which every map is aligned.
inline int widest_vector(Element element, int C, std::initializer_list<Map> maps) {
    const int size = size_of(element);
    for (int width : {16 / size, 4}) {
        const auto suits = [&](const Map& m) {
            return reinterpret_cast<uintptr_t>(m.data) % (width * size) == 0 && m.stride_b % width == 0 &&
                   m.stride_h % width == 0 && m.stride_w % width == 0;
        };
        if (C % width == 0 && std::all_of(maps.begin(), maps.end(), suits)) return width;
    }
    return 1;
}

// Pairs of channels may be read and written as one word.
inline bool is_paired(Element element, int C, const Map& m) {
    return C % 2 == 0 && reinterpret_cast<uintptr_t>(m.data) % (2 * size_of(element)) == 0 && m.stride_b % 2 == 0 &&
           m.stride_h % 2 == 0 && m.stride_w % 2 == 0;
}

inline Map contiguous_map(const Problem& p, void* data) {
    const int64_t row = static_cast<int64_t>(p.W) * p.C;
    return {data, p.H * row, row, p.C};
}

inline ChainParams chain_of(const Problem& p, const Group& group, const Map& ctx) {
    ChainParams chain{};
    chain.B = p.B;
    chain.H = p.H;
    chain.W = p.W;
    chain.C = p.C;
    chain.ctx = ctx;
    chain.gates = p.gates;
    chain.levels = group.last - group.first;
    chain.first_gate = group.first;
    for (int i = chain.levels - 1; i >= 0; --i) {
        const FocalWeight& w = p.weights[group.first + i];
        chain.level[i] = {w.data, nullptr, w.kh, w.kw, 0, chain.reach_y, chain.reach_x};
        chain.reach_y += w.kh / 2;
        chain.reach_x += w.kw / 2;
    }
    for (int i = 0; i < chain.levels; ++i) {
        chain.level[i].tap = chain.taps;
        chain.taps += chain.level[i].kh * chain.level[i].kw;
    }
    chain.tiling = group.tiling;
    chain.ctx_width = widest_vector(p.element, p.C, {ctx});
    chain.agg_width = widest_vector(p.element, p.C, {contiguous_map(p, nullptr)});
    chain.scale = p.scale;
    return chain;
}

// Which block of a launch this one is. Blocks of neighbouring channels follow each other: they share sectors of ctx,
// and the gates, while those are in L2.
struct BlockPlace {
    int image, tiles, tile_index, block;
    Region tile;
};

__device__ __forceinline__ BlockPlace place_of_block(const Tiling& t, int H, int W, int C) {
    const int blocks = (C + t.block_c - 1) / t.block_c, tiles = t.tiles_y * t.tiles_x;
    const int block = blockIdx.x % blocks, tile = blockIdx.x / blocks % tiles, image = blockIdx.x / blocks / tiles;
    const int y = tile / t.tiles_x * t.tile_h, x = tile % t.tiles_x * t.tile_w;
    return {image, tiles, tile, block, {y, min(H, y + t.tile_h), x, min(W, x + t.tile_w)}};
}

inline int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Hands out pieces of one allocation, each aligned as the allocator aligns. Without memory it only counts the bytes.
struct Scratch {
    void* memory;
    int64_t bytes = 0;
    template <typename T>
    T* take(int64_t n) {
        T* piece = memory ? reinterpret_cast<T*>(static_cast<char*>(memory) + bytes) : nullptr;
        bytes += aligned(n * static_cast<int64_t>(sizeof(T)));
        return piece;
    }
};

// with_width for host code, which needs 16 bytes and one element only. It is a function of its own because nvcc makes
// a lambda host or device code by the function that it is written in.
template <typename T, typename F>
void with_width_on_host(int width, F f) {
    constexpr int kMaxWidth = 16 / sizeof(T);
    if (width == kMaxWidth) return f(std::integral_constant<int, kMaxWidth>{});
    f(std::integral_constant<int, 1>{});
}

template <typename F>
Status with_element(Element element, F f) {
    switch (element) {
        case Element::kFloat32:
            return f(float{});
        case Element::kBFloat16:
            return f(__nv_bfloat16{});
        default:
            return f(__half{});
    }
}

// Does not synchronise, so it returns the error of the launch itself, not one of the kernel as it runs.
template <typename... Params, typename... Args>
Status launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared_bytes,
              cudaStream_t stream, Args... args) {
    constexpr int64_t kMaxGrid = 2147483647;
    if (blocks > kMaxGrid) return {cudaErrorInvalidConfiguration, name};
    constexpr size_t kWithoutAsking = 48 * 1024;
    if (shared_bytes > kWithoutAsking) {
        const cudaError_t error =
            cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return {error, name};
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return {cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name};
}

}  // namespace focalnet::cuda
