// Gated aggregation, forward, on tensor cores: bfloat16 and float16.
//
// toeplitz_fwd_kernel: a block owns block_c channels of whole images, or of one tile of an image with the halo of all
// its levels. A channel belongs to one warp, or to several side by side.
//
//     read     ctx once, channels last, turned into planes of one channel; the gates once, a plane each
//     level l  sixteen rows at a time: plane -> mma -> GELU in registers -> agg += gate * GELU, and the rows of the
//              next level's plane. One plane does for all levels: level l + 1 lies k_l / 2 rows above level l, so that
//              a tile's results fall on rows that no later tile reads
//     mean     sums of the last level's rows in float32, then of the rows in a fixed order
//     write    agg + gate * GELU(mean), times the scale, channels last, once
//
//     rows of the plane, 3 x 3 then 5 x 5:    level 1 below        level 2 above it by one row
//         start - 3 .. start - 2                                   zeros
//         start - 1                           zeros                row 0
//         start .. start + H - 2              rows 0 .. H - 2      rows 1 .. H - 1
//         start + H - 1                       row H - 1            zeros, written when the level is done
//         start + H ..                        zeros                zeros
//
// Bytes: ctx read and agg written once, the gates once for every block_c channels. A tile's block reads the halo
// again, and writes the sums of its last level; two small kernels (gated_aggregation_fwd.cu) then add the global term,
// which reads and writes agg once more. agg is kept in T between levels, in shared memory.

#include "launch.cuh"
#include "toeplitz.cuh"
#include "toeplitz.h"

namespace focalnet::cuda {
namespace {

constexpr int kMaxThreads = 512;

struct ToeplitzLevel {
    const void* weight;
    int kh, kw, steps;
    int reach_y;  // rows that the later levels want around the tile
};

struct ToeplitzParams {
    int64_t B;
    int H, W, C, L;
    Map ctx, gates;
    void* agg;            // contiguous
    float* sums;          // [B][tiles][C], of the last level over each tile; null: whole maps
    void* z[kMaxLevels];  // planar, what the levels' convolutions give; null: not wanted
    void* planar_gates;   // [B][L + 1][H][planar_pitch], as they are; null: not wanted
    int planar_pitch;
    ToeplitzLevel level[kMaxLevels];
    int reach_y, reach_x;
    int ctx_width, agg_width;
    bool four_gates;  // lie in 8 bytes, aligned
    float scale;
    ToeplitzTiling tiling;
};

// The block's share of the problem, and where everything lies in shared memory.
template <typename T>
struct ForwardBlock {
    const ToeplitzParams& p;
    int64_t first_image;
    int images, first_c, tile_index;
    Region tile, held;
    T *planes, *sums, *gates, *taps;
    float *row_sums, *global;

    __device__ __forceinline__ ForwardBlock(const ToeplitzParams& p, unsigned char* memory) : p(p) {
        const ToeplitzTiling& t = p.tiling;
        const int blocks = (p.C + t.block_c - 1) / t.block_c, tiles = t.tiles();
        first_c = static_cast<int>(blockIdx.x % blocks) * t.block_c;
        tile_index = static_cast<int>(blockIdx.x / blocks % tiles);
        first_image = static_cast<int64_t>(blockIdx.x / blocks / tiles) * t.images;
        images = static_cast<int>(min(static_cast<int64_t>(t.images), p.B - first_image));
        const int y = tile_index / t.tiles_x * t.tile_h, x = tile_index % t.tiles_x * t.tile_w;
        tile = {y, min(p.H, y + t.tile_h), x, min(p.W, x + t.tile_w)};
        held = grow(tile, p.reach_y, p.reach_x, p.H, p.W);
        planes = reinterpret_cast<T*>(memory);
        sums = planes + t.block_c * t.plane();
        gates = sums + t.block_c * t.sums();
        taps = gates + (p.L + 1) * t.sums();
        row_sums = reinterpret_cast<float*>(taps + t.groups * t.tap_rows * t.tap_pitch);
        global = row_sums + t.block_c * t.warps * t.sum_rows;
    }
    __device__ __forceinline__ int rows() const { return images * held.rows(); }
    // The tile's first row and column in the planes, and how many rows it has there.
    __device__ __forceinline__ int tile_row() const { return tile.y0 - held.y0; }
    __device__ __forceinline__ int tile_column() const { return tile.x0 - held.x0; }
    __device__ __forceinline__ int tile_rows() const { return images * tile.rows(); }
    __device__ __forceinline__ Rows rows_of_planes() const {
        return {images, held.rows(), p.tiling.rows, p.tiling.pitch};
    }
};

template <typename T>
__device__ __forceinline__ void load_gates(const ForwardBlock<T>& b) {
    const ToeplitzParams& p = b.p;
    const Rows rows(b.images, b.tile.rows(), 0, 0);
    const T* from = static_cast<const T*>(p.gates.data) + b.first_image * p.gates.stride_b;
    Walk walk(Region{0, b.tile_rows(), 0, b.tile.columns()}, threadIdx.x, blockDim.x);
    for (; walk.more(); walk.next()) {
        const int image = rows.image(walk.y), y = b.tile.y0 + walk.y - image * rows.held, x = b.tile.x0 + walk.x;
        const T* gate = from + image * p.gates.stride_b + y * p.gates.stride_h + x * p.gates.stride_w;
        T* to = b.gates + walk.y * p.tiling.sum_pitch + b.tile_column() + walk.x;
        if (p.four_gates) {
            T values[4];
            load_raw<4>(gate, values);
#pragma unroll
            for (int l = 0; l < 4; ++l) to[l * p.tiling.sums()] = values[l];
        } else {
            for (int l = 0; l <= p.L; ++l) to[l * p.tiling.sums()] = gate[l];
        }
        if (!p.planar_gates || b.first_c > 0) continue;
        T* planar =
            static_cast<T*>(p.planar_gates) + ((b.first_image + image) * (p.L + 1) * p.H + y) * p.planar_pitch + x;
        for (int l = 0; l <= p.L; ++l) planar[l * p.H * p.planar_pitch] = to[l * p.tiling.sums()];
    }
}

template <typename T>
__device__ __forceinline__ void load_planes(const ForwardBlock<T>& b) {
    const ToeplitzParams& p = b.p;
    const ToeplitzTiling& t = p.tiling;
    const T* at = static_cast<const T*>(p.ctx.data) + b.first_image * p.ctx.stride_b + b.held.y0 * p.ctx.stride_h +
                  b.held.x0 * p.ctx.stride_w + b.first_c;
    T* first = b.planes + p.reach_y * t.pitch + t.padding;
    with_width<T>(p.ctx_width, [&](auto width) {
        fill_planes<T, decltype(width)::value>(first, t.plane(), b.rows_of_planes(), b.rows(), b.held.columns(),
                                               t.block_c, at, p.ctx, p.C - b.first_c);
    });
}

// One of the warps that share a channel.
struct WarpPlace {
    int lane, warp, group;  // warp: which of its channel's
    int c;                  // of the block
};

__device__ __forceinline__ void join(int warps) {  // of a channel
    if (warps > 1)
        __syncthreads();
    else
        __syncwarp();
}

// The tile's own part of z, for backward.
template <typename T, int BLOCKS>
__device__ __forceinline__ void store_z(const ForwardBlock<T>& b, const WarpPlace& w, const float (&z)[BLOCKS][4],
                                        T* to, const Rows& rows, int first, int end) {
    const ToeplitzParams& p = b.p;
    if (b.first_c + w.c >= p.C) return;
    const int x0 = b.held.x0 + 8 * BLOCKS * w.warp + 2 * (w.lane % 4);
    const int beyond = b.tile.x1 < p.W ? b.tile.x1 : p.planar_pitch;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first + w.lane / 4 + 8 * half, image = rows.image(row);
        const int y = b.held.y0 + row - image * rows.held;
        if (row >= end || y < b.tile.y0 || y >= b.tile.y1) continue;
        T* at = to + (((b.first_image + image) * p.C + b.first_c + w.c) * p.H + y) * p.planar_pitch;
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j) {
            const int x = x0 + 8 * j;
            if (x >= b.tile.x0 && x < beyond) store_pair(at + x, {z[j][2 * half], z[j][2 * half + 1]});
        }
    }
}

// What a lane has of a row of the last level, in the columns of the tile; beyond the map it is zero.
template <typename T, int BLOCKS>
__device__ __forceinline__ float sum_of_row(const ForwardBlock<T>& b, const float (&z)[BLOCKS][4], int half,
                                            int column) {
    float sum = 0.0f;
    if (b.p.tiling.whole_map()) {
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j) sum += z[j][2 * half] + z[j][2 * half + 1];
        return sum;
    }
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
        const unsigned x = column + 8 * j - b.tile_column(), width = b.tile.columns();
        sum += (x < width ? z[j][2 * half] : 0.0f) + (x + 1 < width ? z[j][2 * half + 1] : 0.0f);
    }
    return sum;
}

// A tile of sixteen rows from `first`, of which those before `end` exist: GELU, agg, sums of rows, the next plane.
template <typename T, int BLOCKS>
__device__ __forceinline__ void finish_tile(const ForwardBlock<T>& b, const WarpPlace& w, float (&z)[BLOCKS][4],
                                            int level, T* next, const Rows& rows, int first, int end) {
    using Pair = typename PairOf<T>::type;
    const ToeplitzParams& p = b.p;
    const ToeplitzTiling& t = p.tiling;
    const int column = 8 * BLOCKS * w.warp + 2 * (w.lane % 4), columns = b.held.columns();
    const bool is_last = level + 1 == p.L;
    // What lies beyond the map's columns is zero, and so is GELU of it. Planes have room for it.
    if (8 * BLOCKS * (w.warp + 1) > columns)
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) z[j][i] = column + 8 * j + i % 2 < columns ? z[j][i] : 0.0f;
    if (p.z[level]) store_z<T, BLOCKS>(b, w, z, static_cast<T*>(p.z[level]), rows, first, end);
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const float2 pair = gelu_pair<T>(z[j][i], z[j][i + 1]);
            z[j][i] = pair.x;
            z[j][i + 1] = pair.y;
        }
    Pair pairs[2][BLOCKS];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first + w.lane / 4 + 8 * half, sum_row = row - b.tile_row();
        const bool owned = row < end && static_cast<unsigned>(sum_row) < static_cast<unsigned>(b.tile_rows());
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j) pairs[half][j] = PairOf<T>::from(z[j][2 * half], z[j][2 * half + 1]);
        if (owned) {
            const int at = sum_row * t.sum_pitch + column;
            const Pair* gate = reinterpret_cast<const Pair*>(b.gates + level * t.sums() + at);
            Pair* sum = reinterpret_cast<Pair*>(b.sums + w.c * t.sums() + at);
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j) sum[4 * j] = __hfma2(gate[4 * j], pairs[half][j], sum[4 * j]);
        }
        if (is_last) {
            float row_sum = sum_of_row<T, BLOCKS>(b, z, half, column);
            row_sum += __shfl_xor_sync(0xffffffffu, row_sum, 1);
            row_sum += __shfl_xor_sync(0xffffffffu, row_sum, 2);
            if (owned && w.lane % 4 == 0) b.row_sums[(w.c * t.warps + w.warp) * t.sum_rows + sum_row] = row_sum;
        }
    }
    if (is_last) return;
    join(t.warps);  // nobody reads the rows below any more
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first + w.lane / 4 + 8 * half;
        if (row >= end) continue;
        Pair* to = reinterpret_cast<Pair*>(next + rows.offset(row) + column);
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j) to[4 * j] = pairs[half][j];
    }
}

// Level `level` of one channel. `plane`: its first row and column.
template <typename T, int BLOCKS, int STEPS>
__device__ __forceinline__ void run_level(const ForwardBlock<T>& b, const WarpPlace& w, int level, T* plane) {
    const ToeplitzParams& p = b.p;
    const ToeplitzTiling& t = p.tiling;
    const ToeplitzLevel& own = p.level[level];
    T* taps = b.taps + w.group * t.tap_rows * t.tap_pitch;
    if (w.warp == 0)
        write_taps<T>(taps,
                      static_cast<const T*>(own.weight) + static_cast<int64_t>(b.first_c + w.c) * own.kh * own.kw,
                      own.kh, own.kw, STEPS, b.first_c + w.c < p.C, w.lane);
    join(t.warps);
    const Rows rows = b.rows_of_planes();
    // Of whole images all rows; of a tile those that the later levels want.
    const int begin = max(0, b.tile_row() - own.reach_y);
    const int end = min(b.rows(), b.tile_row() + b.tile_rows() + own.reach_y);
    const int first_column = 8 * BLOCKS * w.warp + 8 * (w.lane / 16) + 4 - 8 * STEPS;
    const SharedAddress source = shared_address(plane - own.kh / 2 * t.pitch + first_column);
    const T* lane_taps = taps + tap_of_lane(w.lane, 16 * STEPS + 8);
    T* next = plane - own.kh / 2 * t.pitch;
#pragma unroll 1
    for (int first = begin; first < end; first += kMmaM) {
        float z[BLOCKS][4] = {};
        const int row = min(first + w.lane % 16, end - 1);
        convolve_tile<T, BLOCKS, STEPS>(
            z, source + static_cast<SharedAddress>(rows.offset(row) * static_cast<int>(sizeof(T))),
            t.pitch * static_cast<int>(sizeof(T)), lane_taps, own.kh);
        finish_tile<T, BLOCKS>(b, w, z, level, next, rows, first, end);
    }
    join(t.warps);
    if (level + 1 == p.L) return;
    // The last rows of this level lie below the next level's last row, where its halo is to be zero.
    if (w.warp == 0)
        for (int image = 0; image < b.images; ++image)
            zero(next + (image * rows.slot + rows.held) * t.pitch - t.padding, own.kh / 2 * t.pitch, w.lane, kWarp);
    join(t.warps);
}

// The mean of the last level, or its sum over the tile: a warp takes a channel of an image.
template <typename T>
__device__ __forceinline__ void form_global(const ForwardBlock<T>& b) {
    const ToeplitzParams& p = b.p;
    const ToeplitzTiling& t = p.tiling;
    const int lane = threadIdx.x % kWarp, rows = b.tile.rows();
    for (int i = threadIdx.x / kWarp; i < t.block_c * b.images; i += blockDim.x / kWarp) {
        const int c = i % t.block_c, image = i / t.block_c;
        float sum = 0.0f;
        for (int w = 0; w < t.warps; ++w)
            for (int row = lane; row < rows; row += kWarp)
                sum += b.row_sums[(c * t.warps + w) * t.sum_rows + image * rows + row];
        for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
        if (lane > 0) continue;
        if (!p.sums)
            b.global[image * t.block_c + c] = gelu(sum * (1.0f / (static_cast<float>(p.H) * p.W)));
        else if (b.first_c + c < p.C)
            p.sums[((b.first_image + image) * t.tiles() + b.tile_index) * p.C + b.first_c + c] = sum;
    }
}

template <typename T, int N>
__device__ __forceinline__ void write_agg(const ForwardBlock<T>& b) {
    const ToeplitzParams& p = b.p;
    const ToeplitzTiling& t = p.tiling;
    const Rows rows(b.images, b.tile.rows(), 0, 0);
    const T* global_gate = b.gates + p.L * t.sums();
    for_each_two_columns<N>(b.tile_rows(), b.tile.columns(), t.block_c, [&](int row, int x, int c) {
        if (b.first_c + c >= p.C) return;
        const int image = rows.image(row), at = row * t.sum_pitch + b.tile_column() + x;
        const float2 gate = load_pair(global_gate + at);
        float left[N], right[N];
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const float2 sum = load_pair(b.sums + (c + k) * t.sums() + at);
            const float global = p.sums ? 0.0f : b.global[image * t.block_c + c + k];
            left[k] = p.scale * fmaf(gate.x, global, sum.x);
            right[k] = p.scale * fmaf(gate.y, global, sum.y);
        }
        const int64_t y = (b.first_image + image) * p.H + b.tile.y0 + row - image * rows.held;
        T* to = static_cast<T*>(p.agg) + (y * p.W + b.tile.x0 + x) * p.C + b.first_c + c;
        Vector<T, N>::store(to, left);
        if (x + 1 < b.tile.columns()) Vector<T, N>::store(to + p.C, right);
    });
}

template <typename T, int BLOCKS>
__global__ void __launch_bounds__(kMaxThreads, 1) toeplitz_fwd_kernel(const ToeplitzParams p) {
    FOCALNET_SHARED_MEMORY(memory);
    const ToeplitzTiling& t = p.tiling;
    const ForwardBlock<T> b(p, memory);
    zero(b.planes, t.block_c * (t.plane() + t.sums()) + (p.L + 1) * t.sums(), threadIdx.x, blockDim.x);
    __syncthreads();
    load_planes(b);
    load_gates(b);
    __syncthreads();

    const int warp = threadIdx.x / kWarp;
    for (int c = warp / t.warps; c < t.block_c; c += t.groups) {
        const WarpPlace w{static_cast<int>(threadIdx.x % kWarp), warp % t.warps, warp / t.warps, c};
        T* plane = b.planes + c * t.plane() + p.reach_y * t.pitch + t.padding;
        for (int level = 0; level < p.L; ++level) {
            if (p.level[level].steps == 1)
                run_level<T, BLOCKS, 1>(b, w, level, plane);
            else
                run_level<T, BLOCKS, 2>(b, w, level, plane);
            plane -= p.level[level].kh / 2 * t.pitch;
        }
    }
    __syncthreads();
    form_global(b);
    __syncthreads();
    if (p.agg) with_width<T>(p.agg_width, [&](auto width) { write_agg<T, decltype(width)::value>(b); });
}

ToeplitzParams params_of(const Problem& p, const ToeplitzTiling& tiling, const Map& agg, float* sums) {
    ToeplitzParams params{};
    params.B = p.B;
    params.H = p.H;
    params.W = p.W;
    params.C = p.C;
    params.L = p.L;
    params.ctx = p.ctx;
    params.gates = p.gates;
    params.agg = agg.data;
    params.sums = sums;
    for (int l = p.L - 1; l >= 0; --l) {
        const FocalWeight& w = p.weights[l];
        params.level[l] = {w.data, w.kh, w.kw, toeplitz_steps(w.kw), params.reach_y};
        params.reach_y += w.kh / 2;
        params.reach_x += w.kw / 2;
    }
    params.reach_x += params.reach_x % 2;  // pairs of columns stay pairs
    params.ctx_width = std::min(widest_vector(p.element, p.C, {p.ctx}), tiling.block_c);
    params.agg_width = std::min(widest_vector(p.element, p.C, {agg}), tiling.block_c);
    params.four_gates = p.L == 3 && widest_vector(p.element, 4, {p.gates}) == 4;
    params.scale = p.scale;
    params.tiling = tiling;
    return params;
}

template <typename T, int BLOCKS>
Status launch_toeplitz(const Problem& p, const ToeplitzParams& params, cudaStream_t stream) {
    const ToeplitzTiling& t = params.tiling;
    const int64_t blocks = (p.B + t.images - 1) / t.images * t.tiles() * ((p.C + t.block_c - 1) / t.block_c);
    return launch("toeplitz_fwd_kernel", toeplitz_fwd_kernel<T, BLOCKS>, blocks, t.threads(), t.shared_bytes, stream,
                  params);
}

template <typename T>
Status launch_toeplitz(const Problem& p, const ToeplitzParams& params, cudaStream_t stream) {
    switch (params.tiling.blocks) {
        case 1:
            return launch_toeplitz<T, 1>(p, params, stream);
        case 2:
            return launch_toeplitz<T, 2>(p, params, stream);
        case 4:
            return launch_toeplitz<T, 4>(p, params, stream);
        default:
            return launch_toeplitz<T, 7>(p, params, stream);
    }
}

}  // namespace

int toeplitz_forward_tiles(const Problem& p) { return plan_toeplitz(p).tiles(); }

template <typename T>
Status toeplitz_levels(const Problem& p, const Map& agg, T* const* z, T* planar_gates, float* sums,
                       cudaStream_t stream) {
    const ToeplitzTiling t = plan_toeplitz(p);
    if (t.cost == 0) return {cudaErrorInvalidConfiguration, "toeplitz_fwd_kernel"};
    ToeplitzParams params = params_of(p, t, agg, sums);
    std::copy_n(z, p.L, params.z);
    params.planar_gates = planar_gates;
    params.planar_pitch = planar_pitch(p.W);
    return launch_toeplitz<T>(p, params, stream);
}

template Status toeplitz_levels<__half>(const Problem&, const Map&, __half* const*, __half*, float*, cudaStream_t);
template Status toeplitz_levels<__nv_bfloat16>(const Problem&, const Map&, __nv_bfloat16* const*, __nv_bfloat16*,
                                               float*, cudaStream_t);

namespace {

template <typename T>
Status forward(const Problem& p, const Map& agg, Scratch scratch, cudaStream_t stream) {
    if (planes_forward(p)) return toeplitz_planes<T>(p, agg, stream);
    const ToeplitzTiling t = plan_toeplitz(p);
    if (t.cost == 0) return {cudaErrorInvalidConfiguration, "toeplitz_fwd_kernel"};
    if (t.whole_map()) return launch_toeplitz<T>(p, params_of(p, t, agg, nullptr), stream);
    float* sums = scratch.take<float>(p.B * t.tiles() * p.C);
    float* global = scratch.take<float>(p.B * p.C);
    if (Status s = launch_toeplitz<T>(p, params_of(p, t, agg, sums), stream)) return s;
    if (Status s = form_global_context(p, sums, t.tiles(), global, stream)) return s;
    return add_global<T>(p, agg, global, stream);
}

}  // namespace

size_t toeplitz_forward_scratch_bytes(const Problem& p) {
    if (planes_forward(p)) return 0;
    const ToeplitzTiling t = plan_toeplitz(p);
    return t.whole_map() ? 0 : aligned(4 * p.B * t.tiles() * p.C) + aligned(4 * p.B * p.C);
}

Status toeplitz_forward(const Problem& p, const Map& agg, void* scratch, cudaStream_t stream) {
    if (p.element == Element::kBFloat16) return forward<__nv_bfloat16>(p, agg, Scratch{scratch}, stream);
    return forward<__half>(p, agg, Scratch{scratch}, stream);
}

}  // namespace focalnet::cuda
