// Gated aggregation, backward, on tensor cores, level by level: bfloat16 and float16, maps whose planes of all levels
// do not fit shared memory.
//
//     1  toeplitz_fwd_kernel        z_l of every level, sums of the last one, the gates planar; agg if it is wanted
//     2  gate_sums_kernel, global_bwd_kernel    (gated_aggregation_bwd.cu)
//     3  toeplitz_first_bwd_kernel  dagg, planar; dz_L = (dagg * gate + dmean) * GELU'(z_L); the share of some
//                                   channels in dgates of the last two gates
//     4  toeplitz_level_bwd_kernel  from the last level to the first, from dz_l: dweights_l; with z of the level below
//                                   its dz and dgates, or dctx
//     5  sum_partials_kernel, sum_dgates_kernel: everything that blocks left, in a fixed order
//
// A block owns a band of an image's rows, all columns, and block_c channels. z, dz, dagg and the gates lie in global
// memory as planar maps (toeplitz.h), as they do in shared memory: only ctx and dagg are turned, once each. A gate of
// the projection has a sector of 32 bytes to itself, and every block of channels would ask for it.
//
// Bytes, in maps of C channels: 1 + L for (1), 1 for (2), 4 for (3), 5 for a level of (4), and the rows of a band's
// halo again. z and dz are kept in T, sums in float32.

#include "gated_aggregation_bwd.cuh"
#include "launch.cuh"
#include "toeplitz.h"
#include "toeplitz_bwd.cuh"
#include "toeplitz_correlate.cuh"

namespace focalnet::cuda {
namespace {

// What both kernels take, and where a block is.
struct BandParams {
    int64_t B;
    int H, W, C, L, level;
    int planar;           // the pitch of planar maps
    const void* gates;    // planar, [B][L + 1][H]
    void *z, *dagg, *dz;  // planar; z of `level` (3) or of the level below it (4), dz of `level`
    float* dgates;        // [blocks of channels][B][L + 1][H * W]; null: not wanted
    float scale;
    ToeplitzBandTiling tiling;
};

struct FirstParams : BandParams {
    Map given;                    // dagg, channels last
    const float *global, *dmean;  // [B][C]; dmean null: dz is not wanted
    int width;
};

struct LevelParams : BandParams {
    Map ctx;
    const void* weight;
    void* dbelow;     // planar dz of the level below; null: not wanted, or not this level
    Map dctx;         // no data: as above
    float* dweights;  // [B][bands][taps][C]; null: not wanted
    int kh, kw, ctx_width, out_width;
    Division by_kw;
};

struct BandPlace {
    int block, first_c, band, y0, count;
    int64_t image;

    __device__ __forceinline__ BandPlace(const BandParams& p) {
        const int blocks = (p.C + p.tiling.block_c - 1) / p.tiling.block_c;
        block = static_cast<int>(blockIdx.x % blocks);
        band = static_cast<int>(blockIdx.x / blocks % p.tiling.bands);
        image = blockIdx.x / blocks / p.tiling.bands;
        first_c = block * p.tiling.block_c;
        y0 = band * p.tiling.band;
        count = min(p.tiling.band, p.H - y0);
    }
    // Of a planar map, where row y of channel c of the block begins.
    __device__ __forceinline__ int64_t row_of(const BandParams& p, int c, int y) const {
        return ((image * p.C + first_c + c) * p.H + y) * p.planar;
    }
    // Of a row of the band, two neighbouring positions: a warp writes whole sectors.
    __device__ __forceinline__ void store_dgates(const BandParams& p, int gate, int row, int x, float2 two) const {
        float* to = p.dgates + (((block * p.B + image) * (p.L + 1) + gate) * p.H + y0 + row) * p.W + x;
        if (p.W % 2 == 0) {
            *reinterpret_cast<float2*>(to) = two;
            return;
        }
        to[0] = two.x;
        if (x + 1 < p.W) to[1] = two.y;
    }
};

// gates[row][column] of one gate, a row of `pitch`, for the rows of a band.
template <typename T>
__device__ __forceinline__ void load_gate(T* to, int pitch, const BandParams& p, const BandPlace& at, int gate) {
    const T* from = static_cast<const T*>(p.gates) + ((at.image * (p.L + 1) + gate) * p.H + at.y0) * p.planar;
    Walk walk(Region{0, at.count, 0, p.planar}, threadIdx.x, blockDim.x);
    for (; walk.more(); walk.next())
        to[walk.y * pitch + walk.x] = walk.x < p.W ? from[walk.y * p.planar + walk.x] : from_float<T>(0.0f);
}

// A thread owns two neighbouring positions, and goes over the block's channels of them.
template <typename T>
__global__ void __launch_bounds__(kToeplitzBackwardThreads) toeplitz_first_bwd_kernel(const FirstParams p) {
    FOCALNET_SHARED_MEMORY(memory);
    const ToeplitzBandTiling& t = p.tiling;
    const BandPlace at(p);
    T* dagg = reinterpret_cast<T*>(memory);
    const int plane = t.band * t.sum_pitch;
    T* gate = dagg + t.block_c * plane;
    zero(dagg, (t.block_c + 1) * plane, threadIdx.x, blockDim.x);
    __syncthreads();
    const T* given =
        static_cast<const T*>(p.given.data) + at.image * p.given.stride_b + at.y0 * p.given.stride_h + at.first_c;
    with_width<T>(p.width, [&](auto n) {
        fill_planes<T, decltype(n)::value>(dagg, plane, Rows(1, at.count, 0, t.sum_pitch), at.count, p.W, t.block_c,
                                           given, p.given, p.C - at.first_c);
    });
    load_gate(gate, t.sum_pitch, p, at, p.level);
    __syncthreads();
    const int channels = min(t.block_c, p.C - at.first_c);
    const float *global = p.global + at.image * p.C + at.first_c, *dmean = p.dmean + at.image * p.C + at.first_c;
    Walk walk(Region{0, at.count, 0, p.planar / 2}, threadIdx.x, blockDim.x);
    for (; walk.more(); walk.next()) {
        const int row = walk.y, x = 2 * walk.x, in = row * t.sum_pitch + x;
        const float2 g = load_pair(gate + in);
        float2 last = {0.0f, 0.0f}, all = {0.0f, 0.0f};
        int64_t out = at.row_of(p, 0, at.y0 + row) + x;
#pragma unroll 2
        for (int c = 0; c < channels; ++c, out += static_cast<int64_t>(p.H) * p.planar) {
            const float2 d = load_pair(dagg + c * plane + in), z = load_pair(static_cast<const T*>(p.z) + out);
            if (p.dgates) {
                const float2 v = gelu_pair<T>(z.x, z.y);
                last = {fmaf(d.x, v.x, last.x), fmaf(d.y, v.y, last.y)};
                all = {fmaf(d.x, global[c], all.x), fmaf(d.y, global[c], all.y)};
            }
            store_pair(static_cast<T*>(p.dagg) + out, d);
            if (!p.dmean) continue;
            const float2 slope = gelu_grad_pair<T>(z.x, z.y);
            const float2 dz = {fmaf(p.scale * g.x, d.x, dmean[c]) * slope.x,
                               fmaf(p.scale * g.y, d.y, dmean[c]) * slope.y};
            store_pair(static_cast<T*>(p.dz) + out, inside_map(dz, x, p.W));
        }
        if (!p.dgates || x >= p.W) continue;
        at.store_dgates(p, p.level, row, x, last);
        at.store_dgates(p, p.level + 1, row, x, all);
    }
}

template <typename T>
struct LevelBlock : BandPlace {
    const LevelParams& p;
    WarpShare at;
    Strips strips;
    T *dz, *input, *gate, *taps;
    float* products;

    __device__ __forceinline__ LevelBlock(const LevelParams& p, unsigned char* memory)
        : BandPlace(p), p(p), at(p.tiling.sharers), strips(1, BandPlace::count, 0, p.tiling.pitch) {
        const ToeplitzBandTiling& t = p.tiling;
        dz = reinterpret_cast<T*>(memory);
        input = dz + t.block_c * t.plane();
        gate = input + t.block_c * t.plane();
        taps = gate + t.band * t.sum_pitch;
        products = reinterpret_cast<float*>(taps + t.block_c * t.tap_rows * t.tap_pitch);
    }
    __device__ __forceinline__ int count() const { return BandPlace::count; }
    // The band's first row and column.
    __device__ __forceinline__ T* inside(T* planes, int c) const {
        return planes + c * p.tiling.plane() + p.tiling.halo * p.tiling.pitch + p.tiling.padding;
    }
    __device__ __forceinline__ int halo_above() const { return min(p.kh / 2, y0); }
    __device__ __forceinline__ int held() const { return halo_above() + count() + min(p.kh / 2, p.H - y0 - count()); }
};

// planes = f(values of a planar map), eight columns at a time, with the rows of the halo.
template <typename T, typename F>
__device__ __forceinline__ void fill_from_planar(const LevelBlock<T>& b, T* planes, const void* map, F f) {
    const LevelParams& p = b.p;
    const int above = b.halo_above(), rows = b.held(), chunks = p.planar / 8;
    const int channels = min(p.tiling.block_c, p.C - b.first_c);
    for (int c = 0; c < channels; ++c) {
        const T* from = static_cast<const T*>(map) + b.row_of(p, c, b.y0 - above);
        T* to = b.inside(planes, c) - above * p.tiling.pitch;
        Walk walk(Region{0, rows, 0, chunks}, threadIdx.x, blockDim.x);
#pragma unroll 2
        for (; walk.more(); walk.next()) {
            alignas(16) T values[8];
            load_raw<8>(from + walk.y * p.planar + 8 * walk.x, values);
            f(values);
            uint2 raw[2];
            memcpy(raw, values, sizeof raw);
            uint2* at = reinterpret_cast<uint2*>(to + walk.y * p.tiling.pitch + 8 * walk.x);
            at[0] = raw[0];
            at[1] = raw[1];
        }
    }
}

template <typename T>
__device__ __forceinline__ void fill_from_ctx(const LevelBlock<T>& b) {
    const LevelParams& p = b.p;
    const int above = b.halo_above(), rows = b.held();
    const T* at =
        static_cast<const T*>(p.ctx.data) + b.image * p.ctx.stride_b + (b.y0 - above) * p.ctx.stride_h + b.first_c;
    with_width<T>(p.ctx_width, [&](auto n) {
        fill_planes<T, decltype(n)::value>(b.inside(b.input, 0) - above * p.tiling.pitch, p.tiling.plane(),
                                           Rows(1, rows, 0, p.tiling.pitch), rows, p.W, p.tiling.block_c, at, p.ctx,
                                           p.C - b.first_c);
    });
}

// Of the gate of the level below, whose output `input` holds: a thread owns two neighbouring positions.
template <typename T>
__device__ __forceinline__ void form_dgates(const LevelBlock<T>& b) {
    const LevelParams& p = b.p;
    const int channels = min(p.tiling.block_c, p.C - b.first_c);
    const int64_t plane = static_cast<int64_t>(p.H) * p.planar;
    Walk walk(Region{0, b.count(), 0, (p.W + 1) / 2}, threadIdx.x, blockDim.x);
    for (; walk.more(); walk.next()) {
        const int x = 2 * walk.x;
        const T* dagg = static_cast<const T*>(p.dagg) + b.row_of(p, 0, b.y0 + walk.y) + x;
        const T* input = b.inside(b.input, 0) + walk.y * p.tiling.pitch + x;
        float2 sum = {0.0f, 0.0f};
#pragma unroll 4
        for (int c = 0; c < channels; ++c) {
            const float2 d = load_pair(dagg + c * plane), v = load_pair(input + c * p.tiling.plane());
            sum = {fmaf(d.x, v.x, sum.x), fmaf(d.y, v.y, sum.y)};
        }
        b.store_dgates(p, p.level - 1, walk.y, x, sum);
    }
}

template <typename T, int N>
__device__ __forceinline__ void write_dctx(const LevelBlock<T>& b) {
    const LevelParams& p = b.p;
    for_each_two_columns<N>(b.count(), p.W, p.tiling.block_c, [&](int row, int x, int c) {
        if (b.first_c + c >= p.C) return;
        float2 values[N];
#pragma unroll
        for (int k = 0; k < N; ++k) values[k] = load_pair(b.inside(b.input, c + k) + row * p.tiling.pitch + x);
        T* to = static_cast<T*>(p.dctx.data) + b.image * p.dctx.stride_b + (b.y0 + row) * p.dctx.stride_h +
                x * p.dctx.stride_w + b.first_c + c;
        write_channels<T, N>(to, p.dctx.stride_w, x + 1 < p.W, values);
    });
}

// dctx, in the input's place.
template <int BLOCKS, typename T>
__device__ __forceinline__ void store_dctx(const LevelBlock<T>& b, const Tile<BLOCKS>& tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (!tile.row[half].exists) continue;
        T* to = b.inside(b.input, tile.c) + tile.row[half].y * b.p.tiling.pitch + tile.column;
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j) store_pair(to + 8 * j, tile.pair(half, j));
    }
}

// dz of the level below: (dagg * gate + what this level sends back) * GELU'(z).
template <int BLOCKS, typename T>
__device__ __forceinline__ void store_dz(const LevelBlock<T>& b, const Tile<BLOCKS>& tile) {
    const LevelParams& p = b.p;
    if (b.first_c + tile.c >= p.C) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (!tile.row[half].exists) continue;
        const int y = tile.row[half].y;
        const int64_t at = b.row_of(p, tile.c, b.y0 + y) + tile.column;
        const T *z_at = static_cast<const T*>(p.z) + at, *dagg_at = static_cast<const T*>(p.dagg) + at;
        T* to = static_cast<T*>(p.dbelow) + at;
        const T* gate = b.gate + y * p.tiling.sum_pitch + tile.column;
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j) {
            if (tile.column + 8 * j >= p.planar) continue;
            const float2 z = load_pair(z_at + 8 * j), direct = load_pair(dagg_at + 8 * j), g = load_pair(gate + 8 * j);
            const float2 slope = gelu_grad_pair<T>(z.x, z.y), d = tile.pair(half, j);
            store_pair(to + 8 * j, float2{fmaf(p.scale * g.x, direct.x, d.x) * slope.x,
                                          fmaf(p.scale * g.y, direct.y, d.y) * slope.y});
        }
    }
}

// dz under the kernel turned around.
template <typename T, int BLOCKS>
__device__ __forceinline__ void form_dinput(const LevelBlock<T>& b) {
    with_steps(b.p.kw, [&](auto steps) {
        convolve<BLOCKS, decltype(steps)::value, true, T>(
            b, [&](int c) { return b.inside(b.dz, c); }, b.taps, b.p.kh,
            [&](const Tile<BLOCKS>& tile) {
                if (b.p.level == 0)
                    store_dctx(b, tile);
                else
                    store_dz(b, tile);
            });
    });
}

// The taps of the block's channels, shared out to its warps.
template <typename T>
__device__ __forceinline__ void load_taps(const LevelBlock<T>& b, const T* first) {
    const LevelParams& p = b.p;
    for (int c = b.at.warp; c < p.tiling.block_c; c += b.at.warps)
        write_tap_words(b.taps + c * p.tiling.tap_rows * p.tiling.tap_pitch, first + c * p.kh * p.kw, p.kh, p.kw,
                        toeplitz_steps(p.kw), b.first_c + c < p.C, b.at.lane);
}

template <typename T, int BLOCKS>
__global__ void __launch_bounds__(kToeplitzBackwardThreads, 2) toeplitz_level_bwd_kernel(const LevelParams p) {
    FOCALNET_SHARED_MEMORY(memory);
    const ToeplitzBandTiling& t = p.tiling;
    const LevelBlock<T> b(p, memory);
    const bool wants_dz = p.dbelow || p.dctx.data || p.dweights, wants_input = p.dweights || (p.level > 0 && p.dgates);
    zero(b.dz, static_cast<int>(b.taps - b.dz), threadIdx.x, blockDim.x);
    __syncthreads();
    const T* weight = static_cast<const T*>(p.weight) + static_cast<int64_t>(b.first_c) * p.kh * p.kw;
    if (p.dbelow || p.dctx.data) load_taps(b, weight);
    if (p.dbelow) load_gate(b.gate, t.sum_pitch, p, b, p.level - 1);
    __syncthreads();
    if (wants_dz) fill_from_planar(b, b.dz, p.dz, [](T(&)[8]) {});
    if (wants_input) {
        if (p.level == 0)
            fill_from_ctx(b);
        else
            fill_from_planar(b, b.input, p.z, [](T(&values)[8]) {
#pragma unroll
                for (int i = 0; i < 8; i += 2) {
                    const float2 v = gelu_pair<T>(to_float(values[i]), to_float(values[i + 1]));
                    store_pair(values + i, v);
                }
            });
    }
    __syncthreads();
    if (p.level > 0 && p.dgates) form_dgates(b);
    if (p.dweights) {
        correlate<BLOCKS, T>(
            b, [&](int c) { return b.inside(b.dz, c); }, [&](int c) { return b.inside(b.input, c); }, p.kh, p.kw);
        __syncthreads();  // the input is read no more
        sum_products(b, p.dweights + (b.image * t.bands + b.band) * p.kh * p.kw * p.C, p.kh, p.kw, p.by_kw);
    }
    if (!p.dbelow && !p.dctx.data) return;
    form_dinput<T, BLOCKS>(b);
    if (p.level > 0) return;
    __syncthreads();
    with_width<T>(p.out_width, [&](auto width) { write_dctx<T, decltype(width)::value>(b); });
}

// Where everything lies in scratch. Made once without memory, to count the bytes, and once with it.
template <typename T>
struct Workspace {
    ToeplitzBandsPlan plan;
    T *z[kMaxLevels], *dz[2], *dagg, *gates;
    GlobalTerm global;
    float *dgates, *dweights[kMaxLevels];
    int64_t bytes;

    Workspace(const Problem& p, const Gradients& out, void* memory) : plan(plan_toeplitz_bands(p)) {
        Scratch scratch{memory};
        const int64_t map = p.B * p.C * p.H * planar_pitch(p.W);
        for (int l = 0; l < p.L; ++l) z[l] = scratch.take<T>(map);
        for (int i = 0; i < 2; ++i) dz[i] = scratch.take<T>(map);
        dagg = scratch.take<T>(map);
        gates = scratch.take<T>(p.B * (p.L + 1) * p.H * planar_pitch(p.W));
        global = GlobalTerm(p, toeplitz_forward_tiles(p), scratch);
        dgates = out.want_gates ? scratch.take<float>(blocks_for(p.C, plan.block_c) * p.B * p.H * p.W * (p.L + 1))
                                : nullptr;
        for (int l = 0; l < p.L; ++l)
            dweights[l] = scratch.take<float>(out.want_weights * p.B * plan.level[l].bands * p.weights[l].kh *
                                              p.weights[l].kw * p.C);
        bytes = scratch.bytes;
    }
};

template <typename T>
BandParams band_params(const Problem& p, const Workspace<T>& w, int level) {
    BandParams params{};
    params.B = p.B;
    params.H = p.H;
    params.W = p.W;
    params.C = p.C;
    params.L = p.L;
    params.level = level;
    params.planar = planar_pitch(p.W);
    params.gates = w.gates;
    params.dagg = w.dagg;
    params.dz = w.dz[level % 2];
    params.dgates = w.dgates;
    params.scale = p.scale;
    params.tiling = w.plan.level[level];
    return params;
}

template <typename T>
Status launch_first(const Problem& p, const Map& dagg, const Workspace<T>& w, bool wants_dz, cudaStream_t stream) {
    FirstParams params{};
    static_cast<BandParams&>(params) = band_params(p, w, p.L - 1);
    params.z = w.z[p.L - 1];
    params.given = dagg;
    params.global = w.global.global;
    params.dmean = wants_dz ? w.global.dmean : nullptr;
    params.width = std::min(widest_vector(p.element, p.C, {dagg}), w.plan.block_c);
    params.tiling.band = std::min(p.H, kToeplitzFirstBand);
    params.tiling.bands = blocks_for(p.H, params.tiling.band);
    return launch("toeplitz_first_bwd_kernel", toeplitz_first_bwd_kernel<T>,
                  p.B * params.tiling.bands * blocks_for(p.C, w.plan.block_c), kToeplitzBackwardThreads,
                  w.plan.first_bytes, stream, params);
}

template <typename T>
Status launch_level(const Problem& p, const Gradients& out, const Workspace<T>& w, int level, cudaStream_t stream) {
    const FocalWeight& weight = p.weights[level];
    LevelParams params{};
    static_cast<BandParams&>(params) = band_params(p, w, level);
    params.z = level > 0 ? w.z[level - 1] : nullptr;
    params.ctx = p.ctx;
    params.weight = weight.data;
    params.dbelow = level > 0 && (out.want_ctx || out.want_weights) ? w.dz[(level - 1) % 2] : nullptr;
    params.dctx = level == 0 && out.want_ctx ? out.dctx : Map{};
    params.dweights = out.want_weights ? w.dweights[level] : nullptr;
    params.kh = weight.kh;
    params.kw = weight.kw;
    params.by_kw = Division(weight.kw);
    params.ctx_width = std::min(widest_vector(p.element, p.C, {p.ctx}), w.plan.block_c);
    params.out_width = std::min(widest_vector(p.element, p.C, {params.dctx}), w.plan.block_c);
    const ToeplitzBandTiling& t = params.tiling;
    const auto kernel = t.blocks == 2   ? toeplitz_level_bwd_kernel<T, 2>
                        : t.blocks == 4 ? toeplitz_level_bwd_kernel<T, 4>
                                        : toeplitz_level_bwd_kernel<T, 7>;
    return launch("toeplitz_level_bwd_kernel", kernel, p.B * t.bands * blocks_for(p.C, t.block_c), 32 * t.warps,
                  t.shared_bytes, stream, params);
}

}  // namespace

template <typename T>
size_t toeplitz_bands_scratch_bytes(const Problem& p, const Gradients& out) {
    return static_cast<size_t>(Workspace<T>(p, out, nullptr).bytes);
}

template <typename T>
Status toeplitz_backward_bands(const Problem& p, const Map& dagg, const Gradients& out, void* scratch,
                               cudaStream_t stream) {
    const Workspace<T> w(p, out, scratch);
    const bool wants_dz = out.want_ctx || out.want_weights;
    if (Status s = toeplitz_levels<T>(p, out.agg, w.z, w.gates, w.global.level_sums, stream)) return s;
    if (Status s = global_gradient<T>(p, dagg, w.global, wants_dz, stream)) return s;
    if (out.agg.data)
        if (Status s = add_global<T>(p, out.agg, w.global.global, stream)) return s;
    if (!wants_dz && !out.want_gates) return {};
    if (Status s = launch_first<T>(p, dagg, w, wants_dz, stream)) return s;
    for (int level = p.L - 1; level >= 0; --level) {
        if (level == 0 && !wants_dz) break;
        if (Status s = launch_level<T>(p, out, w, level, stream)) return s;
    }
    const auto parts = [&](int l) { return p.B * w.plan.level[l].bands; };
    if (Status s = sum_weight_partials<T>(p, out, w.dweights, parts, stream)) return s;
    if (!out.want_gates) return {};
    return sum_dgates<T>(p, w.dgates, blocks_for(p.C, w.plan.block_c), out.dgates, stream, true);
}

template size_t toeplitz_bands_scratch_bytes<__half>(const Problem&, const Gradients&);
template size_t toeplitz_bands_scratch_bytes<__nv_bfloat16>(const Problem&, const Gradients&);
template Status toeplitz_backward_bands<__half>(const Problem&, const Map&, const Gradients&, void*, cudaStream_t);
template Status toeplitz_backward_bands<__nv_bfloat16>(const Problem&, const Map&, const Gradients&, void*,
                                                       cudaStream_t);

}  // namespace focalnet::cuda
