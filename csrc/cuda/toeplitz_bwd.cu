// Gated aggregation, backward, on tensor cores: bfloat16 and float16, maps whose planes fit shared memory. Larger ones
// go through toeplitz_bwd_levels.cu.
//
// toeplitz_bwd_kernel: a block owns whole images, and goes over blocks of block_c channels of them, in planes of one
// channel: `context`, one plane z_l for every level, and dagg (toeplitz_bwd_block.cuh). A warp owns tiles of a channel
// (toeplitz_bwd.cuh); in a pass over positions a thread owns four neighbouring ones of all the block's channels. A
// barrier after each line.
//
//     read     the taps of all levels; ctx -> context, dagg; the gates once for all channels
//     taps     written out, of all levels, for both ways
//     level l  tiles: context -> mma -> z_l; of the last level also the sums of GELU(z_L) and of dagg * global gate
//              positions: context = GELU(z_l); dgates_l of these channels; agg += gate * GELU(z_l), in T, as forward
//     global   the mean and its gradient
//     last     positions: agg and dgates of the last two gates; dz_L = (dagg * gate + dmean) * GELU'(z_L), in z_L's
//              plane
//     agg      written, if it is wanted
//     level l  from the last to the first
//              tiles: dz_l under the kernel turned around -> mma -> dz_{l-1} = (dagg * gate + it) * GELU'(z_{l-1}), in
//              z_{l-1}'s plane, and context = GELU(z_{l-1}); of the first level dctx, in dagg's plane, while ctx is
//              read once more
//              tiles: dweights_l of context and dz_l (toeplitz_correlate.cuh)
//     write    dctx once
//
// Maps are read and written channels last; or, where the few channels of a block fill little of a sector of 32 bytes,
// planar (ToeplitzBackwardTiling::planar):
//
//     to_planar_kernel      ctx and dagg -> planar copies in scratch (toeplitz_turn.cu)
//     toeplitz_bwd_kernel   copies rows to shared memory as they lie; dctx replaces ctx's copy, agg dagg's
//     from_planar_kernel    dctx, and agg if it is wanted, channels last
//
// Products make dagg and read agg as well planar as channels last (takes_planar_maps): only ctx and dctx then turn.
//
// Launches: this one, or these three; and two small kernels (partial_sums.cu) that add up the partials in a fixed
// order, for dgates and for the dweights of all levels.
//
// Bytes: ctx read twice (once from L2, mostly); dagg read, agg and dctx written once; the gates once for every
// `chunks` blocks of channels. Planar: every map that turns read and written once more. Partials: dgates, a plane of
// floats for each gate and `chunks` blocks of channels, to which the later ones are added where they lie; dweights,
// one kernel for the images of a block. z and dz are kept in T, sums in float32.

#include "gated_aggregation_bwd.cuh"
#include "launch.cuh"
#include "toeplitz.h"
#include "toeplitz_bwd_block.cuh"
#include "toeplitz_correlate.cuh"

namespace focalnet::cuda {
namespace {

// A level's convolution of `planes`, under the kernel turned around or as it is; f(tile).
template <int BLOCKS, bool TURNED, typename T, typename F>
__device__ __forceinline__ void convolve_level(const BackwardBlock<T>& b, T* planes, int level, F f) {
    const BackwardLevel& own = b.p.level[level];
    with_steps(own.kw, [&](auto steps) {
        convolve<BLOCKS, decltype(steps)::value, TURNED, T>(
            b, [&](int c) { return b.inside(planes, c); }, b.taps_of(level), own.kh, f);
    });
}

// Over a warp: every lane gets the sum.
__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    return value;
}

// z in its place. Of the last level the sums over each strip: of GELU(z), and of dagg * global gate.
template <int BLOCKS, typename T>
__device__ __forceinline__ void store_level(const BackwardBlock<T>& b, int level, const Tile<BLOCKS>& tile) {
    const ToeplitzBackwardTiling& t = b.p.tiling;
    const Strips& strips = b.strips;
    T* z = b.z_of(level, tile.c) + tile.column;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (!tile.row[half].exists) continue;
        T* to = z + strips.offset(tile.row[half]);
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j) store_pair(to + 8 * j, tile.pair(half, j));
    }
    if (level + 1 < b.p.L) return;
    const T *dagg = b.dagg + tile.c * b.sums(), *gate = b.gate(b.p.L);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = 0.0f, dglobal = 0.0f;
        const int at = b.sum_at(tile.row[half], tile.column);
        if (tile.row[half].exists)
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j) {
                const float2 z = tile.pair(half, j), v = gelu_pair<T>(z.x, z.y);
                const float2 d = load_pair(dagg + at + 8 * j), g = load_pair(gate + at + 8 * j);
                sum += v.x + v.y;
                dglobal = fmaf(g.x, d.x, fmaf(g.y, d.y, dglobal));
            }
        sum = sum_of_warp(sum);
        dglobal = sum_of_warp(dglobal);
        const int strip = tile.strip + half;
        if (b.at.lane > 0 || strip >= strips.count) continue;
        const int group = t.groups == 1 ? 0 : tile.column / (8 * BLOCKS);
        float* to = b.strip_sums + 2 * ((tile.c * strips.count + strip) * t.groups + group);
        to[0] = sum;
        to[1] = dglobal;
    }
}

// global = GELU(mean of the last level), dmean = what every position of it receives.
template <typename T>
__device__ __forceinline__ void form_global(const BackwardBlock<T>& b) {
    const BackwardParams& p = b.p;
    const int block_c = p.tiling.block_c;
    const Strips& strips = b.strips;
    const float positions = static_cast<float>(p.H) * p.W;
    for (int i = threadIdx.x; i < block_c * b.images; i += blockDim.x) {
        const int c = i % block_c, image = i / block_c, parts = strips.each * p.tiling.groups;
        const float* from = b.strip_sums + 2 * (c * b.images + image) * parts;
        float sum = 0.0f, dglobal = 0.0f;
        for (int part = 0; part < parts; ++part) {
            sum += from[2 * part];
            dglobal += from[2 * part + 1];
        }
        const float mean = sum / positions;
        b.global[image * block_c + c] = gelu(mean);
        b.dmean[image * block_c + c] = p.scale * dglobal * gelu_grad(mean) / positions;
    }
}

// Sums over channels of four neighbouring positions of a gate. What earlier chunks left is read before this chunk's
// channels are summed, so that nobody waits for it.
struct DgatesSums {
    float* to;
    int count;      // of positions on the map
    bool all, two;  // are on the map, and aligned: four at once, or pairs
    float sum[4] = {};

    template <typename T>
    __device__ __forceinline__ DgatesSums(const BackwardBlock<T>& b, int gate, int row, int x, bool first)
        : to(b.dgates_at(gate, row, x)), count(b.p.W - x), all(b.p.W % 4 == 0), two(b.p.W % 2 == 0) {
        if (first || !b.p.dgates) return;
        if (all) {
            const float4 before = *reinterpret_cast<const float4*>(to);
            sum[0] = before.x;
            sum[1] = before.y;
            sum[2] = before.z;
            sum[3] = before.w;
        } else if (two) {
#pragma unroll
            for (int k = 0; k < 4; k += 2) {
                if (k >= count) break;
                const float2 before = load_pair(to + k);
                sum[k] = before.x;
                sum[k + 1] = before.y;
            }
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (k < count) sum[k] = to[k];
        }
    }
    // Of a pair of positions, the first or the second.
    __device__ __forceinline__ void add(int pair, float2 a, float2 b) {
        sum[2 * pair] = fmaf(a.x, b.x, sum[2 * pair]);
        sum[2 * pair + 1] = fmaf(a.y, b.y, sum[2 * pair + 1]);
    }
    __device__ __forceinline__ void store() const {
        if (all) {
            *reinterpret_cast<float4*>(to) = float4{sum[0], sum[1], sum[2], sum[3]};
        } else if (two) {
#pragma unroll
            for (int k = 0; k < 4; k += 2)
                if (k < count) store_pair(to + k, float2{sum[k], sum[k + 1]});
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (k < count) to[k] = sum[k];
        }
    }
};

// context = GELU(z), and dgates and agg of the level.
template <typename T>
__device__ __forceinline__ void activate(const BackwardBlock<T>& b, int level, bool first) {
    const BackwardParams& p = b.p;
    const int plane = p.tiling.plane(), sums = b.sums(), block_c = p.tiling.block_c;
    const bool wants_agg = p.agg.data != nullptr;
    for_each_four(b, [&](int row, int x) {
        const int at = b.rows.offset(row) + x, in = b.sum_at(row, x);
        const T *z = b.z_of(level, 0) + at, *dagg = b.dagg + in;
        T *context = b.context_of(0) + at, *agg = b.agg + in;
        const TwoPairs<T> gate(b.gate(level) + in);
        DgatesSums dgates(b, level, row, x, first);
#pragma unroll 4
        for (int c = 0; c < block_c; ++c, z += plane, context += plane, dagg += sums, agg += sums) {
            const TwoPairs<T> value(z), d(dagg), before = level > 0 && wants_agg ? TwoPairs<T>(agg) : TwoPairs<T>();
            TwoPairs<T> v, sum;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                v.pair[k] = gelu_packed<T>(value[k].x, value[k].y);
                sum.pair[k] = __hfma2(gate.pair[k], v.pair[k], before.pair[k]);
                dgates.add(k, d[k], v[k]);
            }
            v.store(context);
            if (wants_agg) sum.store(agg);
        }
        if (p.dgates) dgates.store();
    });
}

// (dagg * gate + d) * GELU'(z); the product is rounded, as the reference's is.
template <typename T>
__device__ __forceinline__ float2 form_dz(float2 z, typename PairOf<T>::type dagg, typename PairOf<T>::type gate,
                                          float scale, float2 d) {
    const float2 slope = gelu_grad_pair<T>(z.x, z.y), direct = PairOf<T>::floats(__hmul2(dagg, gate));
    return {fmaf(scale, direct.x, d.x) * slope.x, fmaf(scale, direct.y, d.y) * slope.y};
}

// The last level's dz; dgates and agg of it and of the global level.
template <typename T>
__device__ __forceinline__ void finish_last(const BackwardBlock<T>& b, bool first) {
    const BackwardParams& p = b.p;
    const int plane = p.tiling.plane(), sums = b.sums(), block_c = p.tiling.block_c, level = p.L - 1;
    const bool wants_dz = b.wants_dz(), wants_agg = p.agg.data != nullptr;
    const auto scale = PairOf<T>::from(p.scale, p.scale);
    for_each_four(b, [&](int row, int x) {
        const int in = b.sum_at(row, x), image = b.rows.image(row) * block_c;
        const float *global = b.global + image, *dmean = b.dmean + image;
        const TwoPairs<T> gate(b.gate(level) + in), of_global(b.gate(p.L) + in);
        const T* dagg = b.dagg + in;
        T *z = b.z_of(level, 0) + b.rows.offset(row) + x, *agg = b.agg + in;
        DgatesSums of_last(b, level, row, x, first), of_all(b, p.L, row, x, first);
#pragma unroll 2
        for (int c = 0; c < block_c; ++c, z += plane, dagg += sums, agg += sums) {
            const TwoPairs<T> value(z), d(dagg), before = level > 0 && wants_agg ? TwoPairs<T>(agg) : TwoPairs<T>();
            const float mean = global[c], dsum = dmean[c];
            const auto means = PairOf<T>::from(mean, mean);
            TwoPairs<T> sum, dz;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const auto v = gelu_packed<T>(value[k].x, value[k].y);
                of_last.add(k, d[k], PairOf<T>::floats(v));
                of_all.add(k, d[k], {mean, mean});
                const auto local = __hfma2(gate.pair[k], v, before.pair[k]);
                sum.pair[k] = __hmul2(__hfma2(of_global.pair[k], means, local), scale);
                const float2 formed =
                    inside_map(form_dz<T>(value[k], d.pair[k], gate.pair[k], p.scale, {dsum, dsum}), x + 2 * k, p.W);
                dz.pair[k] = PairOf<T>::from(formed.x, formed.y);
            }
            if (wants_agg) sum.store(agg);
            if (wants_dz) dz.store(z);
        }
        if (!p.dgates) return;
        of_last.store();
        of_all.store();
    });
}

// What level `level` sends back to the level below, times its GELU', in z's place; `context` receives its GELU.
template <int BLOCKS, typename T>
__device__ __forceinline__ void store_dz(const BackwardBlock<T>& b, int below, bool wants_context,
                                         const Tile<BLOCKS>& tile) {
    const Strips& strips = b.strips;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (!tile.row[half].exists) continue;
        const int at = strips.offset(tile.row[half]) + tile.column, in = b.sum_at(tile.row[half], tile.column);
        T *z = b.z_of(below, tile.c) + at, *context = b.context_of(tile.c) + at;
        const T *dagg = b.dagg + tile.c * b.sums() + in, *gate = b.gate(below) + in;
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j) {
            using Pair = typename PairOf<T>::type;
            const float2 value = load_pair(z + 8 * j);
            if (wants_context) *reinterpret_cast<Pair*>(context + 8 * j) = gelu_packed<T>(value.x, value.y);
            const Pair d = *reinterpret_cast<const Pair*>(dagg + 8 * j),
                       g = *reinterpret_cast<const Pair*>(gate + 8 * j);
            store_pair(z + 8 * j, form_dz<T>(value, d, g, b.p.scale, tile.pair(half, j)));
        }
    }
}

template <int BLOCKS, typename T>
__device__ __forceinline__ void store_dctx(const BackwardBlock<T>& b, const Tile<BLOCKS>& tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (!tile.row[half].exists) continue;
        T* to = b.dagg + tile.c * b.sums() + b.sum_at(tile.row[half], tile.column);
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j) store_pair(to + 8 * j, tile.pair(half, j));
    }
}

// Everything up to the last level's dz, of one chunk of channels.
template <int BLOCKS, typename T>
__device__ __forceinline__ void run_forward(const BackwardBlock<T>& b, bool first, bool last) {
    const BackwardParams& p = b.p;
    load_raw_taps(b);
    if (p.tiling.planar)
        copy_planar<true>(b);
    else
        load_maps<true>(b);
    wait_for_copies();
    __syncthreads();
    if (p.tiling.planar && !last) prefetch_planar(b);
    write_all_taps(b);
    __syncthreads();
    for (int l = 0; l < p.L; ++l) {
        convolve_level<BLOCKS, false>(b, b.context, l, [&](const Tile<BLOCKS>& tile) { store_level(b, l, tile); });
        __syncthreads();
        if (l + 1 == p.L) break;
        activate(b, l, first);
        __syncthreads();
    }
    form_global(b);
    __syncthreads();
    finish_last(b, first);
    if (!p.agg.data) return;
    __syncthreads();
    if (p.tiling.planar)
        store_planar(b, b.agg, p.planar_agg);
    else
        store(b, b.agg, p.agg, p.agg_width);
}

template <int BLOCKS, typename T>
__device__ __forceinline__ void run_backward(const BackwardBlock<T>& b) {
    const BackwardParams& p = b.p;
    const bool wants_weights = p.level[0].dweights != nullptr;
    for (int l = p.L - 1; l >= 0; --l) {
        const BackwardLevel& own = p.level[l];
        T* dz = b.z + l * p.tiling.block_c * p.tiling.plane();
        const bool used = l + 1 < p.L && wants_weights;  // context holds what another level needed
        const bool reads_ctx = l == 0 && used;
        if (reads_ctx && p.tiling.planar) copy_planar<false>(b);  // while dctx is made
        if (l > 0)
            convolve_level<BLOCKS, true>(b, dz, l, [&](const Tile<BLOCKS>& tile) { store_dz(b, l - 1, used, tile); });
        else if (p.dctx.data)
            convolve_level<BLOCKS, true>(b, dz, l, [&](const Tile<BLOCKS>& tile) { store_dctx(b, tile); });
        if (reads_ctx && !p.tiling.planar) load_maps<false>(b);
        wait_for_copies();
        __syncthreads();
        if (wants_weights)
            correlate<BLOCKS, T>(
                b, [&](int c) { return b.inside(dz, c); }, [&](int c) { return b.context_of(c); }, own.kh, own.kw);
        __syncthreads();
        if (wants_weights)
            sum_products(b, own.dweights + static_cast<int64_t>(b.group) * own.kh * own.kw * p.C, own.kh, own.kw,
                         own.by_kw);
    }
    if (!p.dctx.data) return;
    if (p.tiling.planar)
        store_planar(b, b.dagg, p.planar_dctx);
    else
        store(b, b.dagg, p.dctx, p.dctx_width);
}

template <typename T, int BLOCKS>
__global__ void __launch_bounds__(kMaxToeplitzBackwardThreads, 1) toeplitz_bwd_kernel(const BackwardParams p) {
    FOCALNET_SHARED_MEMORY(memory);
    const ToeplitzBackwardTiling& t = p.tiling;
    BackwardBlock<T> b(p, memory);
    zero(b.context, static_cast<int>(b.agg - b.context), threadIdx.x, blockDim.x);
    __syncthreads();
    load_gates(b);
    for (int chunk = 0; chunk < t.chunks && b.first_c < p.C; ++chunk, b.first_c += t.block_c) {
        if (chunk > 0) __syncthreads();
        run_forward<BLOCKS>(b, chunk == 0, chunk + 1 == t.chunks || b.first_c + t.block_c >= p.C);
        if (!b.wants_dz()) continue;
        __syncthreads();
        run_backward<BLOCKS>(b);
    }
}

int64_t groups_of(const Problem& p, const ToeplitzBackwardTiling& t) { return (p.B + t.images - 1) / t.images; }

int splits_of(const Problem& p, const ToeplitzBackwardTiling& t) { return blocks_for(p.C, t.block_c * t.chunks); }

struct BackwardScratch {
    float* dgates;
    float* dweights[kMaxLevels];
    void *planar_ctx, *planar_dagg;  // dctx, and agg, take their places
    int64_t bytes;

    BackwardScratch(const Problem& p, const ToeplitzBackwardTiling& t, const Gradients& out, void* memory) {
        Scratch scratch{memory};
        dgates = out.want_gates ? scratch.take<float>(splits_of(p, t) * p.B * p.H * p.W * (p.L + 1)) : nullptr;
        for (int l = 0; l < p.L; ++l)
            dweights[l] = out.want_weights
                              ? scratch.take<float>(groups_of(p, t) * p.weights[l].kh * p.weights[l].kw * p.C)
                              : nullptr;
        const int64_t map = p.B * p.C * p.H * planar_pitch(p.W);
        planar_ctx = t.planar ? scratch.take<uint16_t>(map) : nullptr;
        planar_dagg = t.planar && !out.planar_maps ? scratch.take<uint16_t>(map) : nullptr;
        bytes = scratch.bytes;
    }
};

BackwardParams params_of(const Problem& p, const ToeplitzBackwardTiling& t, const Map& dagg, const Gradients& out,
                         const BackwardScratch& scratch) {
    BackwardParams params{};
    params.B = p.B;
    params.H = p.H;
    params.W = p.W;
    params.C = p.C;
    params.L = p.L;
    params.ctx = p.ctx;
    params.gates = p.gates;
    params.dagg = dagg;
    params.dctx = out.want_ctx ? out.dctx : Map{};
    params.agg = out.agg;
    params.dgates = scratch.dgates;
    params.planar_ctx = params.planar_dctx = scratch.planar_ctx;
    params.planar_dagg = out.planar_maps ? dagg.data : scratch.planar_dagg;
    params.planar_agg = out.planar_maps ? out.agg.data : scratch.planar_dagg;
    params.taps_aligned = true;
    for (int l = 0, rows = 0, taps = 0; l < p.L; ++l) {
        const FocalWeight& w = p.weights[l];
        params.level[l] = {w.data, scratch.dweights[l], w.kh, w.kw, rows, taps, Division(w.kw)};
        params.taps_aligned &= reinterpret_cast<uintptr_t>(w.data) % 4 == 0;
        rows += w.kh;
        taps += w.kh * w.kw;
    }
    params.ctx_width = std::min(widest_vector(p.element, p.C, {p.ctx}), t.block_c);
    params.dagg_width = std::min(widest_vector(p.element, p.C, {dagg}), t.block_c);
    params.dctx_width = std::min(widest_vector(p.element, p.C, {params.dctx}), t.block_c);
    params.agg_width = std::min(widest_vector(p.element, p.C, {params.agg}), t.block_c);
    params.gates_aligned = p.L == 3 && reinterpret_cast<uintptr_t>(p.gates.data) % 8 == 0 &&
                           p.gates.stride_b % 4 == 0 && p.gates.stride_h % 4 == 0 && p.gates.stride_w % 4 == 0;
    params.by_pairs = Division((p.W + 1) / 2);
    params.by_fours = Division((p.W + 3) / 4);
    params.by_eights = Division(planar_pitch(p.W) / 8);
    params.by_rows = Division(p.H);
    params.scale = p.scale;
    params.tiling = t;
    return params;
}

// What the kernel is to find planar.
template <typename T>
Status turn(const Problem& p, const ToeplitzBackwardTiling& t, const Map& dagg, const Gradients& out,
            const BackwardScratch& scratch, cudaStream_t stream) {
    const TurnedMap read[] = {{p.ctx, scratch.planar_ctx}, {dagg, scratch.planar_dagg}};
    return turn_maps<T>(p, read, !t.planar ? 0 : out.planar_maps ? 1 : 2, false, stream);
}

// What the kernel left where the planar copies were.
template <typename T>
Status turn_back(const Problem& p, const ToeplitzBackwardTiling& t, const Gradients& out,
                 const BackwardScratch& scratch, cudaStream_t stream) {
    TurnedMap written[2];
    int count = 0;
    if (t.planar && out.want_ctx) written[count++] = {out.dctx, scratch.planar_ctx};
    if (t.planar && out.agg.data && !out.planar_maps) written[count++] = {out.agg, scratch.planar_dagg};
    return turn_maps<T>(p, written, count, true, stream);
}

template <typename T>
Status backward(const Problem& p, const Map& dagg, const Gradients& out, void* memory, cudaStream_t stream) {
    const ToeplitzBackwardTiling t = plan_toeplitz_backward(p);
    const BackwardScratch scratch(p, t, out, memory);
    const BackwardParams params = params_of(p, t, dagg, out, scratch);
    const auto kernel = t.blocks == 1   ? toeplitz_bwd_kernel<T, 1>
                        : t.blocks == 2 ? toeplitz_bwd_kernel<T, 2>
                        : t.blocks == 4 ? toeplitz_bwd_kernel<T, 4>
                                        : toeplitz_bwd_kernel<T, 7>;
    if (Status s = turn<T>(p, t, dagg, out, scratch, stream)) return s;
    if (Status s = launch("toeplitz_bwd_kernel", kernel, groups_of(p, t) * splits_of(p, t), t.threads(),
                          t.shared_bytes, stream, params))
        return s;
    if (Status s = turn_back<T>(p, t, out, scratch, stream)) return s;
    if (out.want_gates)
        if (Status s = sum_dgates<T>(p, scratch.dgates, splits_of(p, t), out.dgates, stream, true)) return s;
    return sum_weight_partials<T>(p, out, scratch.dweights, [&](int) { return groups_of(p, t); }, stream);
}

}  // namespace

bool takes_planar_maps(const Problem& p) {
    const bool fills_rows = p.W == planar_pitch(p.W), is_empty = p.B == 0 || p.H == 0 || p.W == 0;
    return p.tensor_cores && fills_rows && !is_empty && whole_maps_backward(p) && plan_toeplitz_backward(p).planar;
}

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
