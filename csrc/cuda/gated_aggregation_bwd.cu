// Gated aggregation, backward, from the inputs of forward alone. Maps whose planes, two a level and one more, fit into
// shared memory go through gated_aggregation_bwd_planes.cu in one launch. Here are the others, level by level:
//
//     1  focal_chain_kernel, of forward    z_l of every level again, the sums of the last one, and agg if it is wanted
//     2  gate_sums_kernel                  sum over positions of dagg * the global gate  (for dctx, dweights)
//        global_bwd_kernel                 GELU(mean); the gradient that every position of the last level receives
//     3  dgates_kernel                     sums over channels of dagg * level                      (for dgates)
//     4  focal_level_bwd_kernel            from the last level to the first: dz_l -> dz_{l-1} or dctx, and dweights
//     5  sum_partials_kernel               dweights of all blocks into one (partial_sums.cu)
//
// Bytes, in maps of C channels: 1 + L for the levels, 1 for the sums, 1 + L for dgates, and for a level of (4) dz, its
// input, dagg, z and one write. z and dz are kept in the inputs' element type, sums in float32. No sum depends on the
// order in which blocks run.

#include "correlate.cuh"
#include "gated_aggregation.h"
#include "gated_aggregation_bwd.cuh"
#include "launch.cuh"
#include "tile.cuh"
#include "toeplitz.h"

namespace focalnet::cuda {
namespace {

constexpr int kSumColumns = 64;  // channels of a block of gate_sums_kernel

// A block owns kSumPositions of an image and kSumColumns channels: its threads take vectors of N channels of a
// position, side by side, and positions in turn. sums [B][chunks][C] = sum over the positions of dagg * gate.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    gate_sums_kernel(Map dagg, Map gates, int gate, float* sums, int positions, int W, int C) {
    __shared__ float partial[kThreads * N];
    const int columns = (C + kSumColumns - 1) / kSumColumns, chunks = (positions + kSumPositions - 1) / kSumPositions;
    const int first_c = blockIdx.x % columns * kSumColumns, chunk = blockIdx.x / columns % chunks;
    const int64_t image = blockIdx.x / columns / chunks;
    const int c = first_c + threadIdx.x % (kSumColumns / N) * N, end = min(positions, (chunk + 1) * kSumPositions);
    const T* from = static_cast<const T*>(dagg.data) + image * dagg.stride_b;
    const T* gate_of = static_cast<const T*>(gates.data) + image * gates.stride_b + gate;
    float sum[N] = {};
    if (c < C) {
        for (int i = chunk * kSumPositions + threadIdx.x / (kSumColumns / N); i < end;
             i += kThreads / (kSumColumns / N)) {
            const int64_t y = i / W, x = i % W;
            float values[N];
            Vector<T, N>::load(from + y * dagg.stride_h + x * dagg.stride_w + c, values);
            const float g = to_float(gate_of[y * gates.stride_h + x * gates.stride_w]);
#pragma unroll
            for (int k = 0; k < N; ++k) sum[k] = fmaf(g, values[k], sum[k]);
        }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) partial[k * kThreads + threadIdx.x] = sum[k];
    __syncthreads();
    for (int half = kThreads / 2; half >= kSumColumns / N; half /= 2) {
        if (static_cast<int>(threadIdx.x) < half)
#pragma unroll
            for (int k = 0; k < N; ++k)
                partial[k * kThreads + threadIdx.x] += partial[k * kThreads + threadIdx.x + half];
        __syncthreads();
    }
    if (static_cast<int>(threadIdx.x) < kSumColumns / N && c < C)
#pragma unroll
        for (int k = 0; k < N; ++k) sums[(image * chunks + chunk) * C + c + k] = partial[k * kThreads + threadIdx.x];
}

// A thread owns a channel of an image. From the sums of the last level over each tile, and of dagg * gate over each
// chunk (null: dmean is not wanted): global = GELU(mean), dmean = what every position of the last level receives.
__global__ void global_bwd_kernel(const float* level_sums, int tiles, const float* gate_sums, int chunks,
                                  float* global, float* dmean, int64_t channels, int C, float positions, float scale) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= channels) return;
    const int64_t image = i / C, c = i % C;
    float sum = 0.0f;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += level_sums[(image * tiles + tile) * C + c];
    const float mean = sum / positions;
    global[i] = gelu(mean);
    if (!gate_sums) return;
    float dglobal = 0.0f;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) dglobal += gate_sums[(image * chunks + chunk) * C + c];
    dmean[i] = scale * dglobal * gelu_grad(mean) / positions;
}

struct DgatesParams {
    Map dagg;
    const void* z[kMaxLevels];
    const float* global;
    Map dgates;
    int64_t positions;
    int H, W, C, L;
    float scale;
};

// A warp owns a position: its lanes take vectors of N channels, then add up by shuffles. Reads dagg and every z once,
// writes L + 1 numbers.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) dgates_kernel(const DgatesParams p) {
    const int lane = threadIdx.x % 32;
    const int64_t position = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
    if (position >= p.positions) return;
    const int64_t row = position / p.W, image = row / p.H;
    const T* dagg = static_cast<const T*>(p.dagg.data) + image * p.dagg.stride_b + row % p.H * p.dagg.stride_h +
                    position % p.W * p.dagg.stride_w;
    float sum[kMaxLevels + 1] = {};
    for (int c = lane * N; c < p.C; c += 32 * N) {
        float d[N], z[N];
        Vector<T, N>::load(dagg + c, d);
#pragma unroll
        for (int l = 0; l < kMaxLevels; ++l) {
            if (l >= p.L) break;
            Vector<T, N>::load(static_cast<const T*>(p.z[l]) + position * p.C + c, z);
#pragma unroll
            for (int k = 0; k < N; ++k) sum[l] = fmaf(d[k], gelu(z[k]), sum[l]);
        }
#pragma unroll
        for (int k = 0; k < N; ++k) sum[kMaxLevels] = fmaf(d[k], p.global[image * p.C + c + k], sum[kMaxLevels]);
    }
    float mine = 0.0f;  // lane l ends up with gate l
#pragma unroll
    for (int l = 0; l <= kMaxLevels; ++l) {
        if (l >= p.L && l < kMaxLevels) continue;
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) sum[l] += __shfl_xor_sync(0xffffffffu, sum[l], lanes);
        if (lane == (l == kMaxLevels ? p.L : l)) mine = sum[l];
    }
    if (lane <= p.L)
        static_cast<T*>(p.dgates.data)[position * p.dgates.stride_w + lane] = from_float<T>(p.scale * mine);
}

struct LevelParams {
    int64_t B;
    int H, W, C, level;
    Map dagg, gates;
    Map input;           // what the level's convolution read: ctx, or z of the level below, whose GELU it read
    const void* dz;      // contiguous; null for the last level, which makes it of dagg, z and dmean
    const void* z;       // of the last level
    const float* dmean;  // [B][C]
    const void* weight;
    Map dinput;       // dctx, or dz of the level below, contiguous; no data: not wanted
    float* partials;  // [B][tiles][taps][C]; null: not wanted
    int kh, kw, dz_width, input_width;
    bool dagg_paired, dinput_paired;
    float scale;
    Tiling tiling;
};

// dz of the last level: (scale * dagg * gate + dmean) * GELU'(z).
template <typename T, int N>
__device__ __forceinline__ void fill_last_dz(const Plane<T>& plane, Region region, const LevelParams& p, int image,
                                             int first_c) {
    const T* dagg = static_cast<const T*>(p.dagg.data) + image * p.dagg.stride_b;
    const T* gates = static_cast<const T*>(p.gates.data) + image * p.gates.stride_b + p.level;
    const T* z_map = static_cast<const T*>(p.z) + static_cast<int64_t>(image) * p.H * p.W * p.C;
    const float* dmean = p.dmean + static_cast<int64_t>(image) * p.C;
    fill<T, N>(plane, region, first_c, p.C, [&](int y, int x, int c, float (&values)[N]) {
        float z[N];
        Vector<T, N>::load(dagg + y * p.dagg.stride_h + x * p.dagg.stride_w + c, values);
        Vector<T, N>::load(z_map + (static_cast<int64_t>(y) * p.W + x) * p.C + c, z);
        const float g = p.scale * to_float(gates[y * p.gates.stride_h + x * p.gates.stride_w]);
#pragma unroll
        for (int k = 0; k < N; ++k) values[k] = fmaf(g, values[k], dmean[c + k]) * gelu_grad(z[k]);
    });
}

template <typename T, int N, typename F>
__device__ __forceinline__ void fill_from(const Plane<T>& plane, Region region, const Map& map, int image, int first_c,
                                          int C, F f) {
    const T* from = static_cast<const T*>(map.data) + image * map.stride_b;
    fill<T, N>(plane, region, first_c, C, [&](int y, int x, int c, float (&values)[N]) {
        Vector<T, N>::load(from + y * map.stride_h + x * map.stride_w + c, values);
#pragma unroll
        for (int k = 0; k < N; ++k) values[k] = f(values[k]);
    });
}

// A block owns one tile of one image and block_c channels, and takes the gradient through one level: dz of the tile
// and its halo, and the level's input there, once each into two planes; dinput is dz under the kernel turned around,
// the weights' gradient is the correlation of the planes. Reads dz and the input with halo, dagg and z of the tile.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) focal_level_bwd_kernel(const LevelParams p) {
    FOCALNET_SHARED_MEMORY(memory);
    const BlockPlace at = place_of_block(p.tiling, p.H, p.W, p.C);
    const int block_c = p.tiling.block_c, first_c = at.block * block_c, taps = p.kh * p.kw;
    const Region held = grow(at.tile, p.kh / 2, p.kw / 2, p.H, p.W);

    float2* sums = reinterpret_cast<float2*>(memory);
    float* weights = reinterpret_cast<float*>(sums + blockDim.x * min(p.kw, kMaxColumns));
    T* planes = reinterpret_cast<T*>(weights + taps * block_c);
    const Plane<T> dz{planes, held.y0, held.x0, p.tiling.pitch, block_c};
    const Plane<T> input{planes + p.tiling.rows * p.tiling.pitch, held.y0, held.x0, p.tiling.pitch, block_c};

    const int64_t row = static_cast<int64_t>(p.W) * p.C, image = at.image * p.H * row;
    with_width<T>(p.dz_width, [&](auto width) {
        constexpr int N = decltype(width)::value;
        if (p.dz)
            fill_from<T, N>(dz, held, Map{const_cast<void*>(p.dz), p.H * row, row, p.C}, at.image, first_c, p.C,
                            [](float v) { return v; });
        else
            fill_last_dz<T, N>(dz, held, p, at.image, first_c);
    });
    if (p.partials)
        with_width<T>(p.input_width, [&](auto width) {
            constexpr int N = decltype(width)::value;
            fill_from<T, N>(input, held, p.input, at.image, first_c, p.C,
                            [&](float v) { return p.level > 0 ? gelu(v) : v; });
        });
    load_weights<T>(weights, p.weight, taps, block_c, first_c, p.C);
    __syncthreads();

    if (p.dinput.data) {
        const bool paired = p.C % 2 == 0;
        const T* dagg = static_cast<const T*>(p.dagg.data) + at.image * p.dagg.stride_b + first_c;
        const T* gates = static_cast<const T*>(p.gates.data) + at.image * p.gates.stride_b + p.level - 1;
        const T* z = static_cast<const T*>(p.input.data) + image + first_c;  // read for level > 0 only
        T* dinput = static_cast<T*>(p.dinput.data) + at.image * p.dinput.stride_b + first_c;
        const Taps turned{weights + (taps - 1) * block_c, -block_c, p.kh, p.kw};
        for_each_convolved(dz, held, turned, at.tile, [&](int y, int x, int c, float2 d) {
            if (p.level > 0) {
                const float g = p.scale * to_float(gates[y * p.gates.stride_h + x * p.gates.stride_w]);
                const float2 direct = load_channels(dagg + y * p.dagg.stride_h + x * p.dagg.stride_w + c, first_c + c,
                                                    p.C, p.dagg_paired);
                const float2 below =
                    load_channels(z + y * row + static_cast<int64_t>(x) * p.C + c, first_c + c, p.C, paired);
                d = {fmaf(g, direct.x, d.x) * gelu_grad(below.x), fmaf(g, direct.y, d.y) * gelu_grad(below.y)};
            }
            store_channels(dinput + y * p.dinput.stride_h + x * p.dinput.stride_w + c, d, first_c + c, p.C,
                           p.dinput_paired);
        });
    }
    if (p.partials)
        correlate(
            input, dz, held, at.tile,
            {p.kh, p.kw, p.C, p.partials + (static_cast<int64_t>(at.image) * at.tiles + at.tile_index) * taps * p.C},
            first_c, sums);
}

}  // namespace

template <typename T>
Status global_gradient(const Problem& p, const Map& dagg, const GlobalTerm& term, bool wants_dmean,
                       cudaStream_t stream) {
    Status status;
    if (wants_dmean)
        with_width_on_host<T>(widest_vector(p.element, p.C, {dagg}), [&](auto n) {
            constexpr int N = decltype(n)::value;
            status =
                launch("gate_sums_kernel", gate_sums_kernel<T, N>, p.B * term.chunks * blocks_for(p.C, kSumColumns),
                       kThreads, 0, stream, dagg, p.gates, p.L, term.gate_sums, p.H * p.W, p.W, p.C);
        });
    if (status) return status;
    return launch("global_bwd_kernel", global_bwd_kernel, (p.B * p.C + 255) / 256, 256, 0, stream, term.level_sums,
                  term.tiles, wants_dmean ? term.gate_sums : nullptr, term.chunks, term.global, term.dmean, p.B * p.C,
                  p.C, static_cast<float>(p.H) * p.W, p.scale);
}

template Status global_gradient<float>(const Problem&, const Map&, const GlobalTerm&, bool, cudaStream_t);
template Status global_gradient<__half>(const Problem&, const Map&, const GlobalTerm&, bool, cudaStream_t);
template Status global_gradient<__nv_bfloat16>(const Problem&, const Map&, const GlobalTerm&, bool, cudaStream_t);

namespace {

int64_t parts_of(const Problem& p, const Tiling& t) { return p.B * t.tiles_y * t.tiles_x; }

// Where everything lies in scratch. Made once without memory, to count the bytes, and once with it.
template <typename T>
struct Workspace {
    ForwardPlan plan;
    T* z[kMaxLevels];
    T* between[2];  // levels on the way, where forward takes several launches
    T* dz[2];
    GlobalTerm global;
    float* dweights[kMaxLevels];  // partials
    int64_t bytes;
    bool fits;  // on this device

    Workspace(const Problem& p, const Gradients& out, void* memory) : plan(plan_forward(p)) {
        Scratch scratch{memory};
        const int64_t map = p.B * p.H * p.W * p.C;
        fits = focalnet::cuda::fits(plan);
        for (int l = 0; l < p.L; ++l) {
            const Tiling tiling = plan_backward_level(p, l);
            fits = fits && tiling.cost > 0;
            z[l] = scratch.take<T>(map);
            dweights[l] =
                scratch.take<float>(out.want_weights * parts_of(p, tiling) * p.weights[l].kh * p.weights[l].kw * p.C);
        }
        for (int i = 0; i < 2; ++i) between[i] = scratch.take<T>(plan.groups > i + 1 ? map : 0);
        for (int i = 0; i < 2; ++i) dz[i] = scratch.take<T>(p.L > i + 1 ? map : 0);
        global = GlobalTerm(p, last_tiles(plan), scratch);
        bytes = scratch.bytes;
    }
};

template <typename T>
Status recompute_levels(const Problem& p, const Gradients& out, const Workspace<T>& w, cudaStream_t stream) {
    ChainOutputs outputs{};
    outputs.agg = out.agg.data;
    std::copy_n(w.z, p.L, outputs.z);
    std::copy_n(w.between, 2, outputs.between);
    outputs.sums = w.global.level_sums;
    return run_chain<T>(p, w.plan, outputs, stream);
}

template <typename T>
Status gates_gradient(const Problem& p, const Map& dagg, const Gradients& out, const Workspace<T>& w,
                      cudaStream_t stream) {
    Status status;
    DgatesParams params{dagg, {}, w.global.global, out.dgates, p.B * p.H * p.W, p.H, p.W, p.C, p.L, p.scale};
    for (int l = 0; l < p.L; ++l) params.z[l] = w.z[l];
    with_width_on_host<T>(widest_vector(p.element, p.C, {dagg}), [&](auto n) {
        constexpr int N = decltype(n)::value;
        status = launch("dgates_kernel", dgates_kernel<T, N>, (params.positions + kThreads / 32 - 1) / (kThreads / 32),
                        kThreads, 0, stream, params);
    });
    return status;
}

template <typename T>
Status level_gradients(const Problem& p, const Map& dagg, const Gradients& out, const Workspace<T>& w, int level,
                       cudaStream_t stream) {
    const FocalWeight& weight = p.weights[level];
    const bool is_last = level + 1 == p.L;
    const Map below = level > 0 ? contiguous_map(p, w.z[level - 1]) : p.ctx;
    LevelParams params{};
    params.B = p.B;
    params.H = p.H;
    params.W = p.W;
    params.C = p.C;
    params.level = level;
    params.dagg = dagg;
    params.gates = p.gates;
    params.input = below;
    params.dz = is_last ? nullptr : w.dz[level % 2];
    params.z = w.z[level];
    params.dmean = w.global.dmean;
    params.weight = weight.data;
    params.dinput = level > 0 ? contiguous_map(p, w.dz[(level - 1) % 2]) : out.want_ctx ? out.dctx : Map{};
    params.dinput_paired = is_paired(p.element, p.C, params.dinput);
    params.partials = out.want_weights ? w.dweights[level] : nullptr;
    params.kh = weight.kh;
    params.kw = weight.kw;
    const int dagg_width = widest_vector(p.element, p.C, {dagg}), own = widest_vector(p.element, p.C, {});
    params.dz_width = is_last ? dagg_width : own;
    params.input_width = widest_vector(p.element, p.C, {below});
    params.dagg_paired = dagg_width > 1;
    params.scale = p.scale;
    params.tiling = plan_backward_level(p, level);
    const Tiling& t = params.tiling;
    return launch("focal_level_bwd_kernel", focal_level_bwd_kernel<T>, parts_of(p, t) * blocks_for(p.C, t.block_c),
                  t.threads, t.shared_bytes, stream, params);
}

bool on_tensor_cores(const Problem& p) {
    return p.tensor_cores && (whole_maps_backward(p) || plan_toeplitz_bands(p).cost > 0);
}

// An empty batch: no gradient reaches the weights.
template <typename T>
Status no_weight_gradients(const Problem& p, const Gradients& out, cudaStream_t stream) {
    float* nothing[kMaxLevels] = {};
    return sum_weight_partials<T>(p, out, nothing, [](int) { return 0; }, stream);
}

template <typename T>
Status backward(const Problem& p, const Map& dagg, const Gradients& out, void* scratch, cudaStream_t stream) {
    if (p.B == 0) return no_weight_gradients<T>(p, out, stream);
    if (on_tensor_cores(p)) return toeplitz_backward(p, dagg, out, scratch, stream);
    if (plan_backward_map(p).cost > 0) return backward_of_planes<T>(p, dagg, out, scratch, stream);
    const Workspace<T> w(p, out, scratch);
    if (!w.fits) return {cudaErrorInvalidConfiguration, "focal_level_bwd_kernel"};
    if (Status s = recompute_levels(p, out, w, stream)) return s;
    if (Status s = global_gradient<T>(p, dagg, w.global, out.want_ctx || out.want_weights, stream)) return s;
    if (out.agg.data && !w.plan.whole_map)
        if (Status s = add_global<T>(p, out.agg, w.global.global, stream)) return s;
    if (out.want_gates)
        if (Status s = gates_gradient(p, dagg, out, w, stream)) return s;
    if (!out.want_ctx && !out.want_weights) return {};
    for (int level = p.L - 1; level >= 0; --level)
        if (Status s = level_gradients(p, dagg, out, w, level, stream)) return s;
    return sum_weight_partials<T>(
        p, out, w.dweights, [&](int l) { return parts_of(p, plan_backward_level(p, l)); }, stream);
}

}  // namespace

size_t backward_scratch_bytes(const Problem& p, const Gradients& out) {
    if (p.B == 0) return 0;
    if (on_tensor_cores(p)) return toeplitz_backward_scratch_bytes(p, out);
    size_t bytes = 0;
    with_element(p.element, [&](auto element) {
        using T = decltype(element);
        bytes = plan_backward_map(p).cost > 0 ? scratch_bytes_of_planes<T>(p, out)
                                              : static_cast<size_t>(Workspace<T>(p, out, nullptr).bytes);
        return Status{};
    });
    return bytes;
}

Status gated_aggregation_backward(const Problem& p, const Map& dagg, const Gradients& out, void* scratch,
                                  cudaStream_t stream) {
    return with_element(p.element,
                        [&](auto element) { return backward<decltype(element)>(p, dagg, out, scratch, stream); });
}

}  // namespace focalnet::cuda
