// Gated aggregation, backward, on tensor cores: bfloat16 and float16, maps whose planes fit shared memory. Larger ones
// go through toeplitz_bwd_levels.cu.
//
// toeplitz_bwd_kernel: a block owns whole images and block_c channels of them, in planes of one channel: `context`,
// one plane z_l for every level, and dagg. Everything below is shared out to all warps, with a barrier after each
// line.
//
//     read     ctx -> context, dagg, gates, channels last, each once
//     level l  context -> mma -> z_l;  context = GELU(z_l)
//     sums     mean of GELU(z_L); dagg * global gate over the positions                 a warp owns a channel of an
//     image agg      if it is wanted, and dgates' share of these channels                     a thread owns two
//     positions dz_L     in z_L's plane: (dagg * gate + dmean) * GELU'(z_L) level l  from the last to the first:
//              context = GELU(z_{l-1}), or ctx, read once more
//              dweights_l  of context and dz_l: a warp owns a row of the kernel and a channel (toeplitz_correlate.cuh)
//              dz_{l-1}    = (dagg * gate + dz_l under the kernel turned around) * GELU'(z_{l-1}), in z_{l-1}'s plane;
//              of the first level dctx, in dagg's plane
//     write    dctx once
//
// Bytes: ctx read twice; dagg read, dctx written once; gates once for every block_c channels. Partials: dgates, L + 1
// numbers a position for every block_c channels; dweights, one kernel for the images of a block. Two small kernels
// (gated_aggregation_bwd.cu, _bwd_planes.cu) add them up in a fixed order. z and dz are kept in T, sums in float32.

#include "gated_aggregation_bwd.cuh"
#include "launch.cuh"
#include "toeplitz.h"
#include "toeplitz_bwd.cuh"
#include "toeplitz_correlate.cuh"

namespace focalnet::cuda {
namespace {

struct ToeplitzLevel {
    const void* weight;
    float* dweights;  // [groups of images][taps][C]; null: not wanted
    int kh, kw;
};

struct ToeplitzParams {
    int64_t B;
    int H, W, C, L;
    Map ctx, gates, dagg;
    void *dctx, *agg;  // contiguous; null: not wanted
    float* dgates;     // [blocks of channels][B][H * W][L + 1]; null: not wanted
    ToeplitzLevel level[kMaxLevels];
    int ctx_width, dagg_width, out_width;
    float scale;
    ToeplitzBackwardTiling tiling;
};

template <typename T>
struct BackwardBlock {
    const ToeplitzParams& p;
    int64_t group, first_image;
    int images, block, first_c;
    int lane, warp, warps;
    T *context, *z, *dagg, *gates, *taps;
    float *band, *global, *dmean;

    __device__ __forceinline__ BackwardBlock(const ToeplitzParams& p, unsigned char* memory) : p(p) {
        const ToeplitzBackwardTiling& t = p.tiling;
        const int blocks = (p.C + t.block_c - 1) / t.block_c;
        block = static_cast<int>(blockIdx.x % blocks);
        group = blockIdx.x / blocks;
        first_c = block * t.block_c;
        first_image = group * t.images;
        images = static_cast<int>(min(static_cast<int64_t>(t.images), p.B - first_image));
        lane = threadIdx.x % kWarp;
        warp = threadIdx.x / kWarp;
        warps = blockDim.x / kWarp;
        context = reinterpret_cast<T*>(memory);
        z = context + t.block_c * t.plane();
        dagg = z + p.L * t.block_c * t.plane();
        gates = dagg + t.block_c * t.sums();
        taps = gates + (p.L + 1) * t.sums();
        band = reinterpret_cast<float*>(taps + t.block_c * t.tap_rows * t.tap_pitch);
        global = band + warps * kMmaM * kToeplitzBandPitch;
        dmean = global + t.block_c * t.images;
    }
    __device__ __forceinline__ int count() const { return images * p.H; }  // rows
    __device__ __forceinline__ Rows rows() const { return {images, p.H, p.tiling.rows, p.tiling.pitch}; }
    // The first row and column of a channel.
    __device__ __forceinline__ T* inside(T* planes, int c) const {
        return planes + c * p.tiling.plane() + p.tiling.halo * p.tiling.pitch + p.tiling.padding;
    }
    __device__ __forceinline__ T* context_of(int c) const { return inside(context, c); }
    __device__ __forceinline__ T* z_of(int level, int c) const {
        return inside(z + level * p.tiling.block_c * p.tiling.plane(), c);
    }
    __device__ __forceinline__ int sum_at(int row, int x) const { return row * p.tiling.sum_pitch + x; }
    __device__ __forceinline__ float2 gate(int level, int row, int x) const {
        return load_pair(gates + level * p.tiling.sums() + sum_at(row, x));
    }
    __device__ __forceinline__ float2 dagg_at(int c, int row, int x) const {
        return load_pair(dagg + c * p.tiling.sums() + sum_at(row, x));
    }
};

// f(c, row, x) for every channel, row and second column: a warp, or a few of them, owns a channel.
template <typename T, typename F>
__device__ __forceinline__ void for_each_pair(const BackwardBlock<T>& b, F f) {
    const int block_c = b.p.tiling.block_c, abreast = min(b.warps, block_c), share = b.warps / abreast;
    for (int c = b.warp % abreast; c < block_c; c += abreast) {
        Walk walk(Region{0, b.count(), 0, (b.p.W + 1) / 2}, b.warp / abreast * kWarp + b.lane, share * kWarp);
        for (; walk.more(); walk.next()) f(c, walk.y, 2 * walk.x);
    }
}

template <typename T>
__device__ __forceinline__ void load(const BackwardBlock<T>& b, T* planes, int plane, const Rows& rows, const Map& map,
                                     int width) {
    const T* at = static_cast<const T*>(map.data) + b.first_image * map.stride_b + b.first_c;
    with_width<T>(width, [&](auto n) {
        fill_planes<T, decltype(n)::value>(planes, plane, rows, b.count(), b.p.W, b.p.tiling.block_c, at, map,
                                           b.p.C - b.first_c);
    });
}

template <typename T>
__device__ __forceinline__ void load_ctx(const BackwardBlock<T>& b) {
    load(b, b.context_of(0), b.p.tiling.plane(), b.rows(), b.p.ctx, b.p.ctx_width);
}

template <typename T>
__device__ __forceinline__ void load_gates(const BackwardBlock<T>& b) {
    const ToeplitzParams& p = b.p;
    const Rows rows(b.images, p.H, p.H, 0);
    const T* from = static_cast<const T*>(p.gates.data) + b.first_image * p.gates.stride_b;
    Walk walk(Region{0, b.count(), 0, p.W}, threadIdx.x, blockDim.x);
    for (; walk.more(); walk.next()) {
        const int image = rows.image(walk.y), y = walk.y - image * p.H;
        const T* gate = from + image * p.gates.stride_b + y * p.gates.stride_h + walk.x * p.gates.stride_w;
        for (int l = 0; l <= p.L; ++l) b.gates[l * p.tiling.sums() + b.sum_at(walk.y, walk.x)] = gate[l];
    }
}

template <int BLOCKS, typename T, typename F>
__device__ __forceinline__ void convolve_level(const BackwardBlock<T>& b, T* from, int level, F f) {
    const ToeplitzLevel& own = b.p.level[level];
    with_steps(own.kw, [&](auto steps) {
        convolve<BLOCKS, decltype(steps)::value, T>(b, [&](int c) { return b.inside(from, c); }, own.kh, b.p.W, f);
    });
}

template <typename T>
__device__ __forceinline__ void activate(const BackwardBlock<T>& b, int level) {  // context = GELU(z)
    const Rows rows = b.rows();
    for_each_pair(b, [&](int c, int row, int x) {
        const int at = rows.offset(row) + x;
        const float2 z = load_pair(b.z_of(level, c) + at);
        store_pair(b.context_of(c) + at, gelu_pair<T>(z.x, z.y));
    });
}

// global = GELU(mean of the last level), dmean = what every position of it receives.
template <typename T>
__device__ __forceinline__ void form_global(const BackwardBlock<T>& b) {
    const ToeplitzParams& p = b.p;
    const int block_c = p.tiling.block_c, pairs = (p.W + 1) / 2;
    const Rows rows = b.rows();
    const float positions = static_cast<float>(p.H) * p.W;
    for (int i = b.warp; i < block_c * b.images; i += b.warps) {
        const int c = i % block_c, image = i / block_c;
        float sum = 0.0f, dglobal = 0.0f;
        for (Walk walk(Region{0, p.H, 0, pairs}, b.lane, kWarp); walk.more(); walk.next()) {
            const int row = image * p.H + walk.y, x = 2 * walk.x;
            const float2 level = load_pair(b.context_of(c) + rows.offset(row) + x);
            const float2 g = b.gate(p.L, row, x), d = b.dagg_at(c, row, x);
            sum += level.x + level.y;
            dglobal = fmaf(g.x, d.x, fmaf(g.y, d.y, dglobal));
        }
        for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
            dglobal += __shfl_xor_sync(0xffffffffu, dglobal, lanes);
        }
        const float mean = sum / positions;
        if (b.lane > 0) continue;
        b.global[image * block_c + c] = gelu(mean);
        b.dmean[image * block_c + c] = p.scale * dglobal * gelu_grad(mean) / positions;
    }
}

template <typename T>
__device__ __forceinline__ int64_t position_of(const BackwardBlock<T>& b, int row, int x) {
    return (b.first_image * b.p.H + row) * b.p.W + x;
}

// agg, by vectors of channels. dgates come from the same values, but a thread then owns all channels of a position.
template <typename T, int N>
__device__ __forceinline__ void form_agg(const BackwardBlock<T>& b) {
    const ToeplitzParams& p = b.p;
    const Rows rows = b.rows();
    for_each_two_columns<N>(b.count(), p.W, p.tiling.block_c, [&](int row, int x, int c) {
        if (b.first_c + c >= p.C) return;
        const int at = rows.offset(row) + x;
        const float* global = b.global + rows.image(row) * p.tiling.block_c + c;
        float2 agg[N];
        const float2 last = b.gate(p.L, row, x);
#pragma unroll
        for (int k = 0; k < N; ++k) agg[k] = {last.x * global[k], last.y * global[k]};
        for (int l = 0; l < p.L; ++l) {
            const float2 g = b.gate(l, row, x);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float2 z = load_pair(b.z_of(l, c + k) + at);
                const float2 v = gelu_pair<T>(z.x, z.y);
                agg[k] = {fmaf(g.x, v.x, agg[k].x), fmaf(g.y, v.y, agg[k].y)};
            }
        }
#pragma unroll
        for (int k = 0; k < N; ++k) agg[k] = {p.scale * agg[k].x, p.scale * agg[k].y};
        write_channels<T, N>(b, p.agg, position_of(b, row, x), c, x, agg);
    });
}

// A thread owns two neighbouring positions and adds up this block's channels of them.
template <typename T>
__device__ __forceinline__ void form_dgates(const BackwardBlock<T>& b) {
    const ToeplitzParams& p = b.p;
    const Rows rows = b.rows();
    const int64_t positions = p.B * p.H * p.W;
    Walk walk(Region{0, b.count(), 0, (p.W + 1) / 2}, threadIdx.x, blockDim.x);
    for (; walk.more(); walk.next()) {
        const int row = walk.y, x = 2 * walk.x, at = rows.offset(row) + x;
        const float* global = b.global + rows.image(row) * p.tiling.block_c;
        float* to = p.dgates + (b.block * positions + position_of(b, row, x)) * (p.L + 1);
        for (int l = 0; l <= p.L; ++l) {
            float2 sum = {0.0f, 0.0f};
#pragma unroll 4
            for (int c = 0; c < p.tiling.block_c; ++c) {
                const float2 d = b.dagg_at(c, row, x);
                float2 v = {global[c], global[c]};
                if (l < p.L) {
                    const float2 z = load_pair(b.z_of(l, c) + at);
                    v = gelu_pair<T>(z.x, z.y);
                }
                sum = {fmaf(d.x, v.x, sum.x), fmaf(d.y, v.y, sum.y)};
            }
            to[l] = sum.x;
            if (x + 1 < p.W) to[p.L + 1 + l] = sum.y;
        }
    }
}

// What reaches the output of a level, and the gate's share, times GELU'(z): in z's place.
template <typename T>
__device__ __forceinline__ void form_dz(const BackwardBlock<T>& b, int level, int c, int row, int x, int at,
                                        float2 d) {
    T* z_at = b.z_of(level, c) + at;
    const float2 g = b.gate(level, row, x), direct = b.dagg_at(c, row, x), z = load_pair(z_at);
    const float2 dz = {fmaf(b.p.scale * g.x, direct.x, d.x) * gelu_grad_for_16_bit(z.x),
                       fmaf(b.p.scale * g.y, direct.y, d.y) * gelu_grad_for_16_bit(z.y)};
    store_pair(z_at, inside_map(dz, x, b.p.W));
}

template <typename T>
__device__ __forceinline__ void correlate_level(const BackwardBlock<T>& b, int level) {
    const ToeplitzLevel& own = b.p.level[level];
    const ToeplitzBackwardTiling& t = b.p.tiling;
    float* band = b.band + b.warp * kMmaM * kToeplitzBandPitch;
    for (int item = b.warp; item < t.block_c * own.kh; item += b.warps) {
        const int c = item / own.kh, ky = item % own.kh;
        const float tap = correlate_row<T>(b.z_of(level, c), b.context_of(c) + (ky - own.kh / 2) * t.pitch, b.rows(),
                                           b.count(), b.p.W, t.padding, own.kw, band, b.lane);
        if (b.lane < own.kw && b.first_c + c < b.p.C)
            own.dweights[(b.group * own.kh * own.kw + ky * own.kw + b.lane) * b.p.C + b.first_c + c] = tap;
    }
}

template <typename T, int N>
__device__ __forceinline__ void write_dctx(const BackwardBlock<T>& b) {
    const ToeplitzBackwardTiling& t = b.p.tiling;
    for_each_two_columns<N>(b.count(), b.p.W, t.block_c, [&](int row, int x, int c) {
        if (b.first_c + c >= b.p.C) return;
        float2 values[N];
#pragma unroll
        for (int k = 0; k < N; ++k) values[k] = b.dagg_at(c + k, row, x);
        write_channels<T, N>(b, b.p.dctx, position_of(b, row, x), c, x, values);
    });
}

template <typename T, int BLOCKS>
__global__ void __launch_bounds__(kToeplitzBackwardThreads, 1) toeplitz_bwd_kernel(const ToeplitzParams p) {
    FOCALNET_SHARED_MEMORY(memory);
    const ToeplitzBackwardTiling& t = p.tiling;
    const BackwardBlock<T> b(p, memory);
    const Rows rows = b.rows();
    zero(b.context, t.block_c * ((p.L + 1) * t.plane() + t.sums()) + (p.L + 1) * t.sums(), threadIdx.x, blockDim.x);
    __syncthreads();
    load_ctx(b);
    load(b, b.dagg, t.sums(), Rows(b.images, p.H, p.H, t.sum_pitch), p.dagg, p.dagg_width);
    load_gates(b);
    for (int l = 0; l < p.L; ++l) {
        load_taps<T>(b, p.level[l].weight, p.level[l].kh, p.level[l].kw, false);
        __syncthreads();
        convolve_level<BLOCKS>(b, b.context, l, [&](int c, int row, int x, float2 z) {
            store_pair(b.z_of(l, c) + rows.offset(row) + x, inside_map(z, x, p.W));
        });
        __syncthreads();
        activate(b, l);
    }
    __syncthreads();
    form_global(b);
    __syncthreads();
    if (p.agg) with_width<T>(p.out_width, [&](auto width) { form_agg<T, decltype(width)::value>(b); });
    if (p.dgates) form_dgates(b);
    if (!p.dctx && !p.level[0].dweights) return;
    __syncthreads();
    for_each_pair(b, [&](int c, int row, int x) {
        const float d = b.dmean[rows.image(row) * t.block_c + c];
        form_dz(b, p.L - 1, c, row, x, rows.offset(row) + x, {d, d});
    });
    for (int l = p.L - 1; l >= 0; --l) {
        if (p.level[l].dweights) {
            if (l > 0)
                activate(b, l - 1);
            else
                load_ctx(b);
        }
        load_taps<T>(b, p.level[l].weight, p.level[l].kh, p.level[l].kw, true);
        __syncthreads();
        if (p.level[l].dweights) correlate_level(b, l);
        if (l == 0 && !p.dctx) return;
        convolve_level<BLOCKS>(b, b.z + l * t.block_c * t.plane(), l, [&](int c, int row, int x, float2 d) {
            if (l > 0)
                form_dz(b, l - 1, c, row, x, rows.offset(row) + x, d);
            else
                store_pair(b.dagg + c * t.sums() + b.sum_at(row, x), d);
        });
        __syncthreads();
    }
    with_width<T>(p.out_width, [&](auto width) { write_dctx<T, decltype(width)::value>(b); });
}

int64_t groups_of(const Problem& p, const ToeplitzBackwardTiling& t) { return (p.B + t.images - 1) / t.images; }

struct BackwardScratch {
    float* dgates;
    float* dweights[kMaxLevels];
    int64_t bytes;

    BackwardScratch(const Problem& p, const ToeplitzBackwardTiling& t, const Gradients& out, void* memory) {
        Scratch scratch{memory};
        dgates =
            out.want_gates ? scratch.take<float>(blocks_for(p.C, t.block_c) * p.B * p.H * p.W * (p.L + 1)) : nullptr;
        for (int l = 0; l < p.L; ++l)
            dweights[l] = out.want_weights
                              ? scratch.take<float>(groups_of(p, t) * p.weights[l].kh * p.weights[l].kw * p.C)
                              : nullptr;
        bytes = scratch.bytes;
    }
};

ToeplitzParams params_of(const Problem& p, const ToeplitzBackwardTiling& t, const Map& dagg, const Gradients& out,
                         const BackwardScratch& scratch) {
    ToeplitzParams params{};
    params.B = p.B;
    params.H = p.H;
    params.W = p.W;
    params.C = p.C;
    params.L = p.L;
    params.ctx = p.ctx;
    params.gates = p.gates;
    params.dagg = dagg;
    params.dctx = out.want_ctx ? out.dctx.data : nullptr;
    params.agg = out.agg.data;
    params.dgates = scratch.dgates;
    for (int l = 0; l < p.L; ++l) {
        const FocalWeight& w = p.weights[l];
        params.level[l] = {w.data, scratch.dweights[l], w.kh, w.kw};
    }
    params.ctx_width = std::min(widest_vector(p.element, p.C, {p.ctx}), t.block_c);
    params.dagg_width = std::min(widest_vector(p.element, p.C, {dagg}), t.block_c);
    params.out_width = std::min(widest_vector(p.element, p.C, {}), t.block_c);
    params.scale = p.scale;
    params.tiling = t;
    return params;
}

template <typename T>
Status backward(const Problem& p, const Map& dagg, const Gradients& out, void* memory, cudaStream_t stream) {
    const ToeplitzBackwardTiling t = plan_toeplitz_backward(p);
    const BackwardScratch scratch(p, t, out, memory);
    const ToeplitzParams params = params_of(p, t, dagg, out, scratch);
    const int64_t blocks = groups_of(p, t) * blocks_for(p.C, t.block_c);
    const auto kernel = t.blocks == 2 ? toeplitz_bwd_kernel<T, 2> : toeplitz_bwd_kernel<T, 4>;
    if (Status s =
            launch("toeplitz_bwd_kernel", kernel, blocks, kToeplitzBackwardThreads, t.shared_bytes, stream, params))
        return s;
    if (out.want_gates)
        if (Status s = sum_dgates<T>(p, scratch.dgates, blocks_for(p.C, t.block_c), out.dgates.data, stream)) return s;
    for (int l = 0; l < p.L && out.want_weights; ++l)
        if (Status s = sum_partials<T>(p, l, scratch.dweights[l], groups_of(p, t), out.dweights[l], stream)) return s;
    return {};
}

}  // namespace

size_t toeplitz_backward_scratch_bytes(const Problem& p, const Gradients& out) {
    if (whole_maps_backward(p))
        return static_cast<size_t>(BackwardScratch(p, plan_toeplitz_backward(p), out, nullptr).bytes);
    return toeplitz_bands_scratch_bytes<__half>(p, out);  // of any 16-bit type
}

Status toeplitz_backward(const Problem& p, const Map& dagg, const Gradients& out, void* scratch, cudaStream_t stream) {
    const bool whole = whole_maps_backward(p);
    if (p.element == Element::kBFloat16)
        return whole ? backward<__nv_bfloat16>(p, dagg, out, scratch, stream)
                     : toeplitz_backward_bands<__nv_bfloat16>(p, dagg, out, scratch, stream);
    return whole ? backward<__half>(p, dagg, out, scratch, stream)
                 : toeplitz_backward_bands<__half>(p, dagg, out, scratch, stream);
}

}  // namespace focalnet::cuda
