// Gated aggregation, forward.
//
// focal_chain_kernel: a block owns one tile of one image and block_c channels of it, and runs levels first .. last - 1
// of the chain on them.
//
//     read     the tile and the halo of all its levels, once, in vectors of up to 16 bytes       -> plane 0
//     level i  plane of ctx_i -> registers (z, then GELU) -> plane of ctx_{i+1}, smaller by the level's reach
//     write    agg = sum of gate * level over the tile, once, in vectors
//
// The levels stay in their planes until they are summed, so agg is rounded once. With n levels there are max(2, n)
// planes: the last level is written over the first input, which nobody reads any more.
//
// A block whose tile is the whole map has every position of its channels: it forms the mean and adds the global term.
// Bytes moved: one read of ctx, one write of agg, one read of the gates for every block_c channels. Otherwise each
// block writes the sums of its tile, global_context_kernel makes GELU(mean) of them, and add_global_kernel adds it:
// agg is read and written once more. Where halos would cost more than reading and writing every level, there is one
// launch a level: each writes its level for the next one and adds its share to agg.

#include "gated_aggregation.h"
#include "launch.cuh"
#include "tile.cuh"
#include "toeplitz.h"

namespace focalnet::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(512, 1) focal_chain_kernel(const ChainParams p) {
    FOCALNET_SHARED_MEMORY(memory);
    const BlockPlace at = place_of_block(p.tiling, p.H, p.W, p.C);
    const int pairs = p.tiling.block_c / 2, first_c = at.block * p.tiling.block_c;
    const Region held = grow(at.tile, p.reach_y, p.reach_x, p.H, p.W);
    const bool paired = p.C % 2 == 0;

    float2* sums = reinterpret_cast<float2*>(memory);
    float* weights = reinterpret_cast<float*>(sums + blockDim.x);
    T* planes = reinterpret_cast<T*>(weights + p.taps * p.tiling.block_c);
    const auto plane = [&](int i) {
        const int slot = i == p.levels && i > 1 ? 0 : i;
        return Plane<T>{planes + slot * p.tiling.rows * p.tiling.pitch, held.y0, held.x0, p.tiling.pitch,
                        p.tiling.block_c};
    };

    const T* ctx = static_cast<const T*>(p.ctx.data) + at.image * p.ctx.stride_b;
    with_width<T>(p.ctx_width, [&](auto width) {
        constexpr int N = decltype(width)::value;
        fill<T, N>(plane(0), held, first_c, p.C, [&](int y, int x, int c, float (&values)[N]) {
            Vector<T, N>::load(ctx + y * p.ctx.stride_h + x * p.ctx.stride_w + c, values);
        });
    });
    for (int i = 0; i < p.levels; ++i)
        load_weights<T>(weights + p.level[i].tap * p.tiling.block_c, p.level[i].weight, p.level[i].kh * p.level[i].kw,
                        p.tiling.block_c, first_c, p.C);
    __syncthreads();

    float2 sum = {0.0f, 0.0f};
    Region inside = held;
    const int64_t image = static_cast<int64_t>(at.image) * p.H * p.W * p.C;
    for (int i = 0; i < p.levels; ++i) {
        const ChainLevel& level = p.level[i];
        const Region outputs = grow(at.tile, level.reach_y, level.reach_x, p.H, p.W);
        const Taps taps{weights + level.tap * p.tiling.block_c, p.tiling.block_c, level.kh, level.kw};
        const Plane<T> to = plane(i + 1);
        const bool last = i + 1 == p.levels;
        for_each_convolved(plane(i), inside, taps, outputs, [&](int y, int x, int c, float2 z) {
            const float2 context = {gelu(z.x), gelu(z.y)};
            store_pair(to.at(y, x, c), context);
            const bool owned = at.tile.contains(y, x);
            const int64_t offset = image + (static_cast<int64_t>(y) * p.W + x) * p.C + first_c + c;
            if (last && owned) {
                sum.x += context.x;
                sum.y += context.y;
                if (p.next) store_channels(static_cast<T*>(p.next) + offset, context, first_c + c, p.C, paired);
            }
            if (level.z && owned) store_channels(static_cast<T*>(level.z) + offset, z, first_c + c, p.C, paired);
        });
        inside = outputs;
        __syncthreads();
    }

    if (p.sums || p.adds_global) sum_pairs(sums, sum, pairs);
    if (p.sums && static_cast<int>(threadIdx.x) < pairs) {
        float* to = p.sums + (static_cast<int64_t>(at.image) * at.tiles + at.tile_index) * p.C + first_c;
        const int c = 2 * threadIdx.x;
        if (first_c + c < p.C) to[c] = sums[threadIdx.x].x;
        if (first_c + c + 1 < p.C) to[c + 1] = sums[threadIdx.x].y;
    }
    if (!p.agg) return;

    float* global = reinterpret_cast<float*>(sums);
    if (p.adds_global) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < p.tiling.block_c) {
            // Each thread replaces the one value that it reads.
            global[threadIdx.x] = gelu(global[threadIdx.x] * (1.0f / (static_cast<float>(p.H) * p.W)));
        }
        __syncthreads();
    }
    T* agg = static_cast<T*>(p.agg) + image;
    const T* gates = static_cast<const T*>(p.gates.data) + at.image * p.gates.stride_b;
    with_width<T>(p.agg_width, [&](auto width) {
        constexpr int N = decltype(width)::value;
        for_each_vector<N>(at.tile, p.tiling.block_c, [&](int y, int x, int c) {
            if (first_c + c >= p.C) return;
            const T* gate = gates + y * p.gates.stride_h + x * p.gates.stride_w;
            T* to = agg + (static_cast<int64_t>(y) * p.W + x) * p.C + first_c + c;
            float result[N] = {}, values[N];
            add_levels(result, gate + p.first_gate, p.levels, [&](int i) { return plane(i + 1).at(y, x, c); });
            if (p.adds_global) add_gated(result, to_float(gate[p.first_gate + p.levels]), global + c);
#pragma unroll
            for (int k = 0; k < N; ++k) result[k] *= p.scale;
            if (p.accumulates) {
                Vector<T, N>::load(to, values);
#pragma unroll
                for (int k = 0; k < N; ++k) result[k] += values[k];
            }
            Vector<T, N>::store(to, result);
        });
    });
}

// A thread owns a channel of an image: sums [B][tiles][C] -> GELU(mean) [B][C].
__global__ void global_context_kernel(const float* sums, float* global, int64_t channels, int C, int tiles,
                                      float positions) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= channels) return;
    const float* from = sums + i / C * tiles * C + i % C;
    float sum = 0.0f;
    for (int tile = 0; tile < tiles; ++tile) sum += from[static_cast<int64_t>(tile) * C];
    global[i] = gelu(sum / positions);
}

constexpr int kAddThreads = 256;

// agg += scale * gate * global. A block owns a share of an image's positions, and a thread N channels of some of them:
// it reads those of global once, and for each position a gate and agg, which it writes.
template <typename T, int N>
__global__ void __launch_bounds__(kAddThreads)
    add_global_kernel(T* agg, const float* global, Map gates, int gate, float scale, int shares, int H, int W, int C) {
    constexpr int kFloats = N < 4 ? N : 4;  // of one access
    const int side = min(C / N, kAddThreads), together = kAddThreads / side, thread = threadIdx.x;
    if (thread >= side * together) return;
    const int64_t image = blockIdx.x / shares;
    const int first = blockIdx.x % shares * together + thread / side;
    const T* from = static_cast<const T*>(gates.data) + image * gates.stride_b + gate;
    T* map = agg + image * H * W * C;
    for (int c = thread % side * N; c < C; c += side * N) {
        float own[N / kFloats][kFloats];
#pragma unroll
        for (int k = 0; k < N; k += kFloats)
            Vector<float, kFloats>::load(global + image * C + c + k, own[k / kFloats]);
        Walk walk(Region{0, H, 0, W}, first, shares * together);
        for (; walk.more(); walk.next()) {
            const float g = scale * to_float(from[walk.y * gates.stride_h + walk.x * gates.stride_w]);
            T* at = map + (static_cast<int64_t>(walk.y) * W + walk.x) * C + c;
            float values[N];
            Vector<T, N>::load(at, values);
#pragma unroll
            for (int k = 0; k < N; ++k) values[k] = fmaf(g, own[k / kFloats][k % kFloats], values[k]);
            Vector<T, N>::store(at, values);
        }
    }
}

template <typename T>
Status forward(const Problem& p, const Map& agg, Scratch scratch, cudaStream_t stream) {
    const ForwardPlan plan = plan_forward(p);
    if (!fits(plan)) return {cudaErrorInvalidConfiguration, "focal_chain_kernel"};
    const int tiles = last_tiles(plan);
    ChainOutputs outputs{};
    outputs.agg = agg.data;
    for (int i = 0; i < 2; ++i) outputs.between[i] = scratch.take<T>(plan.groups > i + 1 ? p.B * p.H * p.W * p.C : 0);
    if (plan.whole_map) return run_chain<T>(p, plan, outputs, stream);
    outputs.sums = scratch.take<float>(p.B * tiles * p.C);
    float* global = scratch.take<float>(p.B * p.C);
    if (Status s = run_chain<T>(p, plan, outputs, stream)) return s;
    if (Status s = form_global_context(p, outputs.sums, tiles, global, stream)) return s;
    return add_global<T>(p, agg, global, stream);
}

}  // namespace

Status form_global_context(const Problem& p, const float* sums, int tiles, float* global, cudaStream_t stream) {
    return launch("global_context_kernel", global_context_kernel, (p.B * p.C + 255) / 256, 256, 0, stream, sums,
                  global, p.B * p.C, p.C, tiles, static_cast<float>(p.H) * p.W);
}

template <typename T>
Status run_chain(const Problem& p, const ForwardPlan& plan, const ChainOutputs& outputs, cudaStream_t stream) {
    Map ctx = p.ctx;
    for (int i = 0; i < plan.groups; ++i) {
        const Group& group = plan.group[i];
        const Tiling& t = group.tiling;
        const bool is_last = i + 1 == plan.groups;
        ChainParams chain = chain_of(p, group, ctx);
        for (int l = group.first; l < group.last; ++l) chain.level[l - group.first].z = outputs.z[l];
        chain.agg = outputs.agg;
        chain.accumulates = i > 0;
        chain.adds_global = plan.whole_map && outputs.agg;
        chain.next = is_last ? nullptr : outputs.between[i % 2];
        chain.sums = is_last ? outputs.sums : nullptr;
        const int64_t blocks = p.B * t.tiles_y * t.tiles_x * ((p.C + t.block_c - 1) / t.block_c);
        if (Status s =
                launch("focal_chain_kernel", focal_chain_kernel<T>, blocks, t.threads, t.shared_bytes, stream, chain))
            return s;
        ctx = contiguous_map(p, chain.next);
    }
    return {};
}

template <typename T>
Status add_global(const Problem& p, const Map& agg, const float* global, cudaStream_t stream) {
    Status status;
    with_width_on_host<T>(widest_vector(p.element, p.C, {agg}), [&](auto n) {
        constexpr int N = decltype(n)::value;
        const int together = kAddThreads / std::min(p.C / N, kAddThreads);
        const int shares = std::min(blocks_for(static_cast<int64_t>(p.H) * p.W, together),
                                    blocks_for(16 * p.limits.multiprocessors, p.B));
        status = launch("add_global_kernel", add_global_kernel<T, N>, p.B * shares, kAddThreads, 0, stream,
                        static_cast<T*>(agg.data), global, p.gates, p.L, p.scale, shares, p.H, p.W, p.C);
    });
    return status;
}

#define FOCALNET_INSTANTIATE(T)                                                                          \
    template Status run_chain<T>(const Problem&, const ForwardPlan&, const ChainOutputs&, cudaStream_t); \
    template Status add_global<T>(const Problem&, const Map&, const float*, cudaStream_t);
FOCALNET_INSTANTIATE(float)
FOCALNET_INSTANTIATE(__half)
FOCALNET_INSTANTIATE(__nv_bfloat16)

size_t forward_scratch_bytes(const Problem& p) {
    if (p.B == 0) return 0;
    if (p.tensor_cores) return toeplitz_forward_scratch_bytes(p);
    const ForwardPlan plan = plan_forward(p);
    if (plan.whole_map) return 0;
    const int64_t map = p.B * p.H * p.W * p.C * size_of(p.element);
    return aligned(4 * p.B * last_tiles(plan) * p.C) + aligned(4 * p.B * p.C) +
           std::min(plan.groups - 1, 2) * aligned(map);
}

Status gated_aggregation(const Problem& p, const Map& agg, void* scratch, cudaStream_t stream) {
    if (p.B == 0) return {};
    if (p.tensor_cores) return toeplitz_forward(p, agg, scratch, stream);
    return with_element(p.element,
                        [&](auto element) { return forward<decltype(element)>(p, agg, Scratch{scratch}, stream); });
}

}  // namespace focalnet::cuda
