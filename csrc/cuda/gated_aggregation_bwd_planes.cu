// Gated aggregation, backward, of maps whose planes fit shared memory.
//
// plane_bwd_kernel: a block owns one image and block_c channels of it, all positions.
//
//     read     ctx once                                                                 -> plane of ctx_0
//     level l  plane of ctx_l -> registers (z) -> planes of ctx_{l+1} = GELU(z) and of GELU'(z)
//     sums     mean of ctx_L; dagg * global gate over the positions                     (dagg read)
//     agg      if it is wanted, from the same planes: the gradient of the modulator's weight needs it
//     dgates   a thread owns a position: its channels of dagg times every level         (dagg read, partials written)
//     level l  from the last to the first, in the plane of GELU'(z_l), which becomes dz_l:
//              dz_l = (dagg * gate + what level l + 1 sends back) * GELU'(z_l)           (dagg read)
//              dweights_l from the planes of ctx_l and dz_l                              (partials written)
//     write    dctx once
//
// 2 L + 1 planes. dagg is read L + 2 times, from L2 but for the first. Partials: dgates, L + 1 numbers a position for
// every block_c channels; dweights, one kernel an image. Two small kernels add them up
// (partial_sums.cu).

#include "correlate.cuh"
#include "gated_aggregation.h"
#include "gated_aggregation_bwd.cuh"
#include "tile.cuh"

namespace focalnet::cuda {
namespace {

struct PlaneLevel {
    const void* weight;
    float* dweights;  // [B][taps][C]; null: not wanted
    int kh, kw, tap;
};

struct PlaneParams {
    int64_t B;
    int H, W, C, L, taps, columns;  // columns: the most that correlate sums at once
    Map ctx, gates, dagg;
    Map dctx;       // no data: not wanted
    void* agg;      // contiguous; null: not wanted
    float* dgates;  // [blocks of channels][B][H * W][L + 1]; null: not wanted
    PlaneLevel level[kMaxLevels];
    Tiling tiling;
    int ctx_width, dagg_width, agg_width;
    bool dctx_paired;
    float scale;
};

template <typename T>
struct PlaneBlock {
    const PlaneParams& p;
    int64_t image;
    int first_c;
    Region map;
    float2* sums;
    float* weights;
    float* global;  // GELU(mean), then dmean, of every channel of the block
    float* dmean;
    T* planes;
    const T* dagg;
    const T* gates;

    __device__ __forceinline__ Plane<T> plane(int i) const {
        return {planes + i * p.tiling.rows * p.tiling.pitch, 0, 0, p.tiling.pitch, p.tiling.block_c};
    }
    __device__ __forceinline__ Plane<T> context(int l) const { return plane(l); }
    __device__ __forceinline__ Plane<T> dz(int l) const { return plane(p.L + 1 + l); }
    __device__ __forceinline__ Taps taps(int l, bool turned) const {
        const PlaneLevel& level = p.level[l];
        const int last = turned ? level.kh * level.kw - 1 : 0, block_c = p.tiling.block_c;
        return {weights + (level.tap + last) * block_c, turned ? -block_c : block_c, level.kh, level.kw};
    }
    __device__ __forceinline__ float gate(int y, int x, int l) const {
        return to_float(gates[y * p.gates.stride_h + x * p.gates.stride_w + l]);
    }
    __device__ __forceinline__ float2 dagg_at(int y, int x, int c) const {
        return load_channels(dagg + y * p.dagg.stride_h + x * p.dagg.stride_w + c, first_c + c, p.C, p.dagg_width > 1);
    }
};

template <typename T>
__device__ __forceinline__ void load_plane(const PlaneBlock<T>& b) {
    const PlaneParams& p = b.p;
    const T* ctx = static_cast<const T*>(p.ctx.data) + b.image * p.ctx.stride_b;
    with_width<T>(p.ctx_width, [&](auto width) {
        constexpr int N = decltype(width)::value;
        fill<T, N>(b.context(0), b.map, b.first_c, p.C, [&](int y, int x, int c, float (&values)[N]) {
            Vector<T, N>::load(ctx + y * p.ctx.stride_h + x * p.ctx.stride_w + c, values);
        });
    });
    for (int l = 0; l < p.L; ++l)
        load_weights<T>(b.weights + p.level[l].tap * p.tiling.block_c, p.level[l].weight,
                        p.level[l].kh * p.level[l].kw, p.tiling.block_c, b.first_c, p.C);
    __syncthreads();
}

// All levels again. Returns this thread's share of the last level's sum.
template <typename T>
__device__ __forceinline__ float2 run_levels(const PlaneBlock<T>& b) {
    float2 sum = {0.0f, 0.0f};
    for (int l = 0; l < b.p.L; ++l) {
        const Plane<T> context = b.context(l + 1), slope = b.dz(l);
        const bool last = l + 1 == b.p.L;
        for_each_convolved(b.context(l), b.map, b.taps(l, false), b.map, [&](int y, int x, int c, float2 z) {
            const float2 value = {gelu(z.x), gelu(z.y)};
            store_pair(context.at(y, x, c), value);
            store_pair(slope.at(y, x, c), {gelu_grad(z.x), gelu_grad(z.y)});
            if (last) {
                sum.x += value.x;
                sum.y += value.y;
            }
        });
        __syncthreads();
    }
    return sum;
}

// This thread's share of the sum over positions of dagg * global gate; the pair of channels is that of run_levels.
template <typename T>
__device__ __forceinline__ float2 sum_global_gate(const PlaneBlock<T>& b) {
    float2 sum = {0.0f, 0.0f};
    for_each_vector<2>(b.map, b.p.tiling.block_c, [&](int y, int x, int c) {
        const float g = b.gate(y, x, b.p.L);
        const float2 d = b.dagg_at(y, x, c);
        sum.x = fmaf(g, d.x, sum.x);
        sum.y = fmaf(g, d.y, sum.y);
    });
    return sum;
}

template <typename T>
__device__ __forceinline__ void form_global(const PlaneBlock<T>& b, float2 level_sum, float2 gate_sum) {
    const int pairs = b.p.tiling.block_c / 2, thread = threadIdx.x;
    const float positions = static_cast<float>(b.p.H) * b.p.W;
    sum_pairs(b.sums, level_sum, pairs);
    float2 mean = {0.0f, 0.0f};
    if (thread < pairs) mean = {b.sums[thread].x / positions, b.sums[thread].y / positions};
    __syncthreads();
    sum_pairs(b.sums, gate_sum, pairs);
    if (thread < pairs) {
        const float2 d = b.sums[thread];
        b.global[2 * thread] = gelu(mean.x);
        b.global[2 * thread + 1] = gelu(mean.y);
        b.dmean[2 * thread] = b.p.scale * d.x * gelu_grad(mean.x) / positions;
        b.dmean[2 * thread + 1] = b.p.scale * d.y * gelu_grad(mean.y) / positions;
    }
    __syncthreads();
}

template <typename T>
__device__ __forceinline__ void form_agg(const PlaneBlock<T>& b) {
    const PlaneParams& p = b.p;
    with_width<T>(p.agg_width, [&](auto width) {
        constexpr int N = decltype(width)::value;
        for_each_vector<N>(b.map, p.tiling.block_c, [&](int y, int x, int c) {
            if (b.first_c + c >= p.C) return;
            float result[N] = {};
            add_levels(result, b.gates + y * p.gates.stride_h + x * p.gates.stride_w, p.L,
                       [&](int i) { return b.context(i + 1).at(y, x, c); });
            add_gated(result, b.gate(y, x, p.L), b.global + c);
#pragma unroll
            for (int k = 0; k < N; ++k) result[k] *= p.scale;
            const int64_t position = (b.image * p.H + y) * p.W + x;
            Vector<T, N>::store(static_cast<T*>(p.agg) + position * p.C + b.first_c + c, result);
        });
    });
}

// A thread owns a position and adds up this block's channels of it.
template <typename T>
__device__ __forceinline__ void form_dgates(const PlaneBlock<T>& b, int block) {
    const PlaneParams& p = b.p;
    const int gates = p.L + 1, positions = p.H * p.W;
    float* to = p.dgates + (block * p.B + b.image) * positions * gates;
    for (int i = threadIdx.x; i < positions; i += blockDim.x) {
        const int y = i / p.W, x = i % p.W;
        float sum[kMaxLevels + 1] = {};
        for (int c = 0; c < p.tiling.block_c; c += 2) {
            const float2 d = b.dagg_at(y, x, c);
#pragma unroll
            for (int l = 0; l < kMaxLevels; ++l) {
                if (l >= p.L) break;
                const float2 v = load_pair(b.context(l + 1).at(y, x, c));
                sum[l] = fmaf(d.x, v.x, fmaf(d.y, v.y, sum[l]));
            }
            sum[kMaxLevels] = fmaf(d.x, b.global[c], fmaf(d.y, b.global[c + 1], sum[kMaxLevels]));
        }
#pragma unroll
        for (int l = 0; l < kMaxLevels; ++l)
            if (l < p.L) to[static_cast<int64_t>(i) * gates + l] = sum[l];
        to[static_cast<int64_t>(i) * gates + p.L] = sum[kMaxLevels];
    }
}

// d, which reaches the output of level l, and the gate's share: times GELU'(z_l), in place.
template <typename T>
__device__ __forceinline__ void form_dz(const PlaneBlock<T>& b, int l, int y, int x, int c, float2 d) {
    T* slope = b.dz(l).at(y, x, c);
    const float g = b.p.scale * b.gate(y, x, l);
    const float2 direct = b.dagg_at(y, x, c), by = load_pair(slope);
    store_pair(slope, {fmaf(g, direct.x, d.x) * by.x, fmaf(g, direct.y, d.y) * by.y});
}

template <typename T>
__global__ void __launch_bounds__(512, 1) plane_bwd_kernel(const PlaneParams p) {
    FOCALNET_SHARED_MEMORY(memory);
    const int block_c = p.tiling.block_c, blocks = (p.C + block_c - 1) / block_c, block = blockIdx.x % blocks;
    float2* sums = reinterpret_cast<float2*>(memory);
    float* weights = reinterpret_cast<float*>(sums + blockDim.x * p.columns);
    float* global = weights + p.taps * block_c;
    const int64_t image = blockIdx.x / blocks;
    const PlaneBlock<T> b{p,
                          image,
                          block * block_c,
                          {0, p.H, 0, p.W},
                          sums,
                          weights,
                          global,
                          global + block_c,
                          reinterpret_cast<T*>(global + 2 * block_c),
                          static_cast<const T*>(p.dagg.data) + image * p.dagg.stride_b + block * block_c,
                          static_cast<const T*>(p.gates.data) + image * p.gates.stride_b};

    load_plane(b);
    const float2 level_sum = run_levels(b);
    form_global(b, level_sum, sum_global_gate(b));
    if (p.agg) form_agg(b);
    if (p.dgates) form_dgates(b, block);
    if (!p.dctx.data && !p.level[0].dweights) return;

    for_each_vector<2>(b.map, block_c,
                       [&](int y, int x, int c) { form_dz(b, p.L - 1, y, x, c, {b.dmean[c], b.dmean[c + 1]}); });
    __syncthreads();
    T* dctx = static_cast<T*>(p.dctx.data) + image * p.dctx.stride_b + b.first_c;
    for (int l = p.L - 1; l >= 0; --l) {
        const PlaneLevel& level = p.level[l];
        if (level.dweights)
            correlate(b.context(l), b.dz(l), b.map, b.map,
                      {level.kh, level.kw, p.C, level.dweights + image * level.kh * level.kw * p.C}, b.first_c, sums);
        if (l == 0 && !p.dctx.data) return;
        // One call for all levels, so that the code holds one copy of the convolution for each width.
        for_each_convolved(b.dz(l), b.map, b.taps(l, true), b.map, [&](int y, int x, int c, float2 d) {
            if (l > 0)
                form_dz(b, l - 1, y, x, c, d);
            else
                store_channels(dctx + y * p.dctx.stride_h + x * p.dctx.stride_w + c, d, b.first_c + c, p.C,
                               p.dctx_paired);
        });
        __syncthreads();
    }
}

struct PlaneScratch {
    float* dgates;
    float* dweights[kMaxLevels];
    int64_t bytes;

    PlaneScratch(const Problem& p, const Gradients& out, void* memory) {
        Scratch scratch{memory};
        const int64_t blocks = blocks_for(p.C, plan_backward_map(p).block_c);
        dgates = out.want_gates ? scratch.take<float>(blocks * p.B * p.H * p.W * (p.L + 1)) : nullptr;
        for (int l = 0; l < p.L; ++l)
            dweights[l] =
                out.want_weights ? scratch.take<float>(p.B * p.weights[l].kh * p.weights[l].kw * p.C) : nullptr;
        bytes = scratch.bytes;
    }
};

PlaneParams params_of(const Problem& p, const Map& dagg, const Gradients& out, const PlaneScratch& scratch) {
    PlaneParams params{};
    params.B = p.B;
    params.H = p.H;
    params.W = p.W;
    params.C = p.C;
    params.L = p.L;
    params.ctx = p.ctx;
    params.gates = p.gates;
    params.dagg = dagg;
    params.dctx = out.want_ctx ? out.dctx : Map{};
    params.dctx_paired = is_paired(p.element, p.C, params.dctx);
    params.agg = out.agg.data;
    params.agg_width = widest_vector(p.element, p.C, {});
    params.dgates = scratch.dgates;
    params.columns = 1;
    for (int l = 0; l < p.L; ++l) {
        const FocalWeight& w = p.weights[l];
        params.level[l] = {w.data, scratch.dweights[l], w.kh, w.kw, params.taps};
        params.taps += w.kh * w.kw;
        params.columns = std::max(params.columns, std::min(w.kw, kMaxColumns));
    }
    params.tiling = plan_backward_map(p);
    params.ctx_width = widest_vector(p.element, p.C, {p.ctx});
    params.dagg_width = widest_vector(p.element, p.C, {dagg});
    params.scale = p.scale;
    return params;
}

}  // namespace

template <typename T>
size_t scratch_bytes_of_planes(const Problem& p, const Gradients& out) {
    return static_cast<size_t>(PlaneScratch(p, out, nullptr).bytes);
}

template <typename T>
Status backward_of_planes(const Problem& p, const Map& dagg, const Gradients& out, void* memory, cudaStream_t stream) {
    const PlaneScratch scratch(p, out, memory);
    const PlaneParams params = params_of(p, dagg, out, scratch);
    const int blocks = blocks_for(p.C, params.tiling.block_c);
    if (Status s = launch("plane_bwd_kernel", plane_bwd_kernel<T>, p.B * blocks, params.tiling.threads,
                          params.tiling.shared_bytes, stream, params))
        return s;
    if (out.want_gates)
        if (Status s = sum_dgates<T>(p, scratch.dgates, blocks, out.dgates, stream)) return s;
    return sum_weight_partials<T>(p, out, scratch.dweights, [&](int) { return p.B; }, stream);
}

#define FOCALNET_INSTANTIATE(T)                                                   \
    template size_t scratch_bytes_of_planes<T>(const Problem&, const Gradients&); \
    template Status backward_of_planes<T>(const Problem&, const Map&, const Gradients&, void*, cudaStream_t);
FOCALNET_INSTANTIATE(float)
FOCALNET_INSTANTIATE(__half)
FOCALNET_INSTANTIATE(__nv_bfloat16)

}  // namespace focalnet::cuda
