// Gated aggregation, forward, on tensor cores, of small maps: up to 32 columns or 48 to 56, and up to 56 rows of
// one image or of several one above the other. One launch, bfloat16 and float16, kernels of at most nine columns.
//
// toeplitz_fwd_planes_kernel: a block takes groups of images in turn, and of each sixteen channels or eight; of wide
// maps as many again, with the same gates. A warp computes a channel from the first level to the last without the
// others, then the next one that it has.
//
//     fetch          ctx, channels last, and gates of the next turn: all loads at once, into registers that nobody
//                    needs meanwhile
//     once a block   zeros into the planes, which leaves a halo around every image; the taps of all levels
//     write          the turn before: plane -> channels last
//     place          what was fetched -> planes and gates in shared memory; the turn after it is called to L2
//     level l        the whole plane at once: plane -> mma -> GELU in registers -> agg += gate * GELU in registers,
//                    and the same rows of the plane
//     mean           sums of the last level: a product with ones
//     finish         agg + gate * GELU(mean) -> plane
//
// A set is every seventh row of the group, one of each of the warp's eight rows of lanes: row 7g + i of set i. A tile
// takes sets i and i + 4, and its input at row ky of a kernel is that of tile i + 1 at row ky - 1. So four tiles that
// are computed together read k + 3 fragments of sixteen rows, where one after another they would read 4k:
//
//     tile 0      T(0)  T(1)  T(2)
//     tile 1            T(0)  T(1)  T(2)
//     tile 2                  T(0)  T(1)  T(2)              of a kernel of three rows; the eighth set is nobody's
//     tile 3                        T(0)  T(1)  T(2)
//     fragments    0     1     2     3     4     5
//
// Bytes: ctx read and agg written once, in whole sectors of 32 bytes with sixteen channels. With eight, which shared
// memory may leave no choice but, two blocks share every sector: L2 moves twice as much. The gates, once for every
// block of threads.

#include "toeplitz_planes.cuh"

namespace focalnet::cuda {
namespace {

constexpr int kTiles = (kSets + 1) / 2;
static_assert(kTiles == 4, "the second set of a tile is the first of the tile four further");

// What a lane has of a channel: its row of each set, in BLOCKS blocks of two columns.
template <typename T, int BLOCKS, int CHANNELS>
struct PlanesWarp {
    using Size = Sizes<BLOCKS, CHANNELS>;
    int limit;             // sets in which the lane has a row
    uint32_t mask;         // of the last block: columns that exist
    SharedAddress source;  // of the lane's row of ldmatrix, at set 0
    int place, gates, taps;
    uint32_t agg[kSets][BLOCKS];

    __device__ __forceinline__ PlanesWarp(const PlanesBlock<T, BLOCKS, CHANNELS>& b, int channel) {
        const ToeplitzPlanesTiling& t = b.p.tiling;
        const int lane = thread_index() % kWarp, g = lane / 4, column = 8 * (BLOCKS - 1) + 2 * (lane % 4);
        mask = (column < b.p.W ? 0xffffu : 0u) | (column + 1 < b.p.W ? 0xffff0000u : 0u);
        // Lanes without an image read the last one's rows.
        const int last = kSets * ((t.images << t.image_bits) - 1), first = min(kSets * g, last);
        limit = b.image(kSets * g) < b.images_of(b.turn) ? b.p.H - b.row_of_image(kSets * g) : 0;
        const int at = toeplitz_plane_channel(BLOCKS, channel);
        source = shared_address(b.memory + b.plane_row(min(kSets * (lane % 8), last)) + at +
                                lane / 8 % 2 * kTiles * Size::kRow + lane / 16 * 16);
        place = b.plane_row(first) + at + 2 * kToeplitzPadding + 4 * (lane % 4);
        gates = b.p.gates_at + kSets * g * Size::kGateRow + lane % 4 * (Size::kGateRow / 4);
        taps =
            b.p.taps_at + (b.part(b.turn) * CHANNELS + channel) * t.tap_rows * kTapRow + 8 * (2 * (lane % 4) + 7 - g);
#pragma unroll
        for (int set = 0; set < kSets; ++set)
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j) agg[set][j] = 0;
    }
};

// Sixteen rows of a plane, a column of eight more than there are blocks.
template <int BLOCKS>
struct Fragments {
    uint32_t a[BLOCKS + 1][2];

    __device__ __forceinline__ explicit Fragments(SharedAddress row) {
        // The four registers of a whole product must come from one ldmatrix: every second block takes two halves.
#pragma unroll
        for (int j = 0; j < BLOCKS; j += 2)
            ldmatrix_x4<false>(a[j][0], a[j][1], a[j + 1][0], a[j + 1][1], row + 16 * j);
        if constexpr (BLOCKS % 2 == 0) ldmatrix_x2<false>(a[BLOCKS][0], a[BLOCKS][1], row + 16 * BLOCKS);
    }
};

template <typename T, int BLOCKS>
__device__ __forceinline__ void add_products(float (&z)[BLOCKS][4], const Fragments<BLOCKS>& rows, const uint2& taps) {
    const auto& a = rows.a;
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
        if (j % 2 == 0) {
            mma<T>(z[j], a[j][0], a[j][1], a[j + 1][0], a[j + 1][1], taps.x, taps.y);
        } else {
            mma_half<T>(z[j], a[j][0], a[j][1], taps.x);
            mma_half<T>(z[j], a[j + 1][0], a[j + 1][1], taps.y);
        }
    }
}

__device__ __forceinline__ uint2 load_taps(const unsigned char* taps) { return *reinterpret_cast<const uint2*>(taps); }

// A level's products: `kh` rows of the kernel, an odd number and three at least. `source`: the lane's row of ldmatrix,
// for the first of them.
template <typename T, int BLOCKS, int ROW>
__device__ __forceinline__ void convolve_plane(float (&z)[kTiles][BLOCKS][4], SharedAddress source,
                                               const unsigned char* taps, int kh) {
    uint2 last[kTiles - 1];  // the rows of taps before the next one
#pragma unroll
    for (int i = 0; i < kTiles - 1; ++i) {
        last[i] = load_taps(taps + i * kTapRow);
        const Fragments<BLOCKS> rows(source + i * ROW);
#pragma unroll
        for (int tile = 0; tile <= i; ++tile) add_products<T>(z[tile], rows, last[i - tile]);
    }
    source += (kTiles - 1) * ROW;
    taps += (kTiles - 1) * kTapRow;
    const SharedAddress end = source + (kh - kTiles + 1) * ROW;
#pragma unroll 1
    for (; source != end; source += 2 * ROW, taps += 2 * kTapRow) {
        const uint2 next[] = {load_taps(taps), load_taps(taps + kTapRow)};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Fragments<BLOCKS> rows(source + i * ROW);
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
                add_products<T>(z[tile], rows, tile <= i ? next[i - tile] : last[kTiles - 1 + i - tile]);
        }
        last[0] = last[2];
        last[1] = next[0];
        last[2] = next[1];
    }
#pragma unroll
    for (int i = 0; i < kTiles - 1; ++i) {
        const Fragments<BLOCKS> rows(source + i * ROW);
#pragma unroll
        for (int tile = i + 1; tile < kTiles; ++tile) add_products<T>(z[tile], rows, last[kTiles - 1 + i - tile]);
    }
}

// Calls f(block, pair of gates) for the lane's row in a set.
template <int BLOCKS, typename F>
__device__ __forceinline__ void for_each_gate(const unsigned char* gates, int set, F f) {
    const unsigned char* row = gates + set * toeplitz_gate_row(BLOCKS);
    if constexpr (BLOCKS == 1) {
        f(0, load_word(row));
    } else if constexpr (BLOCKS == 2) {
        const uint2 two = *reinterpret_cast<const uint2*>(row);
        f(0, two.x);
        f(1, two.y);
    } else {
#pragma unroll
        for (int j = 0; j < BLOCKS; j += 4) {
            const uint4 four = *reinterpret_cast<const uint4*>(row + j / 4 * toeplitz_gate_part(BLOCKS));
            f(j, four.x);
            f(j + 1, four.y);
            if (j + 2 < BLOCKS) f(j + 2, four.z);
            if (j + 3 < BLOCKS) f(j + 3, four.w);
        }
    }
}

// Rows that no image has stay zero.
template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void store_set(const PlanesBlock<T, BLOCKS, CHANNELS>& b,
                                          const PlanesWarp<T, BLOCKS, CHANNELS>& w, int set,
                                          const uint32_t (&pairs)[BLOCKS]) {
    if (set >= w.limit) return;
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j)
        word_at(b.memory, w.place + set * Sizes<BLOCKS, CHANNELS>::kRow + 16 * j) = pairs[j];
}

// The sum of the lane's rows in a tile, by a product with ones.
template <typename T, int BLOCKS>
__device__ __forceinline__ float sum_of_rows(const uint32_t (&pairs)[2][BLOCKS], bool has_upper, bool has_lower) {
    const uint32_t ones = pair_word<T>(PairOf<T>::from(1.0f, 1.0f));
    float sum[4] = {};
#pragma unroll
    for (int j = 0; j + 1 < BLOCKS; j += 2)
        mma<T>(sum, pairs[0][j], pairs[1][j], pairs[0][j + 1], pairs[1][j + 1], ones, ones);
    if constexpr (BLOCKS % 2 == 1) mma_half<T>(sum, pairs[0][BLOCKS - 1], pairs[1][BLOCKS - 1], ones);
    return (has_upper ? sum[0] : 0.0f) + (has_lower ? sum[2] : 0.0f);
}

// A level of a channel. It returns the sum of the lane's rows, if it is the last one, and else leaves a plane.
template <bool LAST, typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ float run_plane_level(const PlanesBlock<T, BLOCKS, CHANNELS>& b,
                                                 PlanesWarp<T, BLOCKS, CHANNELS>& w, int level) {
    using Size = Sizes<BLOCKS, CHANNELS>;
    const PlanesLevel& own = b.p.level[level];
    float z[kTiles][BLOCKS][4] = {}, sum = 0.0f;
    convolve_plane<T, BLOCKS, Size::kRow>(z, w.source - own.rows / 2 * Size::kRow,
                                          b.memory + w.taps + own.first_row * kTapRow, own.rows);
    __syncwarp();  // nobody reads the plane any more
    const unsigned char* gates = b.memory + w.gates + level * Size::kGatePlane;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t pairs[2][BLOCKS] = {};
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const int set = tile + kTiles * part;
            if (set >= kSets) continue;
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j)
                pairs[part][j] = pair_word<T>(gelu_packed<T>(z[tile][j][2 * part], z[tile][j][2 * part + 1]));
            // What lies beyond the map's columns is zero for the next level.
            pairs[part][BLOCKS - 1] &= w.mask;
            for_each_gate<BLOCKS>(gates, set, [&](int j, uint32_t gate) {
                w.agg[set][j] = fma_pair<T>(gate, pairs[part][j], w.agg[set][j]);
            });
            if constexpr (!LAST) store_set(b, w, set, pairs[part]);
        }
        if constexpr (LAST) sum += sum_of_rows<T, BLOCKS>(pairs, tile < w.limit, tile + kTiles < w.limit);
    }
    __syncwarp();  // the plane is there
    return sum;
}

// GELU of the mean of the lane's image, twice in a word, from the sums of the lanes' rows.
template <typename T>
__device__ __forceinline__ uint32_t mean_of_image(const PlanesParams& p, float sum) {
#pragma unroll
    for (int bit = 0; bit < 3; ++bit) {
        const float other = __shfl_xor_sync(0xffffffffu, sum, 4 << bit);
        if (bit < p.tiling.image_bits) sum += other;
    }
    const float value = gelu(sum * p.share);
    return pair_word<T>(PairOf<T>::from(value, value));
}

template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void finish_planes(const PlanesBlock<T, BLOCKS, CHANNELS>& b,
                                              PlanesWarp<T, BLOCKS, CHANNELS>& w, uint32_t mean) {
    const PlanesParams& p = b.p;
    const unsigned char* gates = b.memory + w.gates + p.L * Sizes<BLOCKS, CHANNELS>::kGatePlane;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
        for_each_gate<BLOCKS>(gates, set,
                              [&](int j, uint32_t gate) { w.agg[set][j] = fma_pair<T>(gate, mean, w.agg[set][j]); });
        if (p.scales) {
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j) {
                typename PairOf<T>::type pair;
                memcpy(&pair, &w.agg[set][j], sizeof pair);
                const float2 both = load_pair(reinterpret_cast<const T*>(&pair));
                w.agg[set][j] = pair_word<T>(PairOf<T>::from(p.scale * both.x, p.scale * both.y));
            }
        }
        w.agg[set][BLOCKS - 1] &= w.mask;
        store_set(b, w, set, w.agg[set]);
    }
}

template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void compute_group(const PlanesBlock<T, BLOCKS, CHANNELS>& b) {
    const int channels = min(CHANNELS, b.p.C - b.first_c(b.turn));
#pragma unroll 1
    for (int channel = thread_index() / kWarp; channel < channels; channel += Sizes<BLOCKS, CHANNELS>::kWarps) {
        PlanesWarp<T, BLOCKS, CHANNELS> w(b, channel);
        const int last = b.p.L - 1;
#pragma unroll 1
        for (int level = 0; level < last; ++level) run_plane_level<false>(b, w, level);
        const float sum = run_plane_level<true>(b, w, last);
        finish_planes(b, w, mean_of_image<T>(b.p, sum));
    }
}

template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void set_up(const PlanesBlock<T, BLOCKS, CHANNELS>& b) {
    using Size = Sizes<BLOCKS, CHANNELS>;
    const int thread = thread_index();
    zero(reinterpret_cast<T*>(b.memory), b.p.gates_at / 2, thread, Size::kThreads);
#pragma unroll 1
    for (int channel = 2 * (thread / kWarp); channel < b.p.tiling.owned(); channel += 2 * Size::kWarps)
        write_plane_taps(b, channel + thread % kWarp / 16);
}

template <typename T, int BLOCKS, int CHANNELS>
__global__ void __launch_bounds__(toeplitz_plane_warps(BLOCKS, CHANNELS) * kWarp,
                                  toeplitz_planes_resident(BLOCKS, CHANNELS))
    toeplitz_fwd_planes_kernel(const PlanesParams p) {
    FOCALNET_SHARED_MEMORY(memory);
    PlanesBlock<T, BLOCKS, CHANNELS> b(p, memory);
#pragma unroll 1
    while (true) {
        const int next = b.turn + 1;
        const bool more = b.group(next) < p.groups, has_gates = b.part(next) == 0;
        Fetched<BLOCKS, CHANNELS> fetched{};
        if (more) {
            if (p.ctx_width == kPart) fetch_ctx(b, next, fetched);
            if (has_gates && p.four_gates)
                fetch_gates<T, BLOCKS, CHANNELS, true>(b, next, fetched);
            else if (has_gates)
                fetch_gates<T, BLOCKS, CHANNELS, false>(b, next, fetched);
        }
        if (b.is_empty()) {
            set_up(b);
        } else {
            __syncthreads();
            with_width<T>(p.agg_width,
                          [&](auto width) { write_group<T, BLOCKS, CHANNELS, decltype(width)::value>(b); });
        }
        if (!more) return;
        __syncthreads();
        b.turn = next;
        if (p.ctx_width == kPart)
            place_ctx(b, fetched);
        else if (p.ctx_width == 4)
            read_ctx<T, BLOCKS, CHANNELS, 4>(b);
        else
            read_ctx<T, BLOCKS, CHANNELS, 1>(b);
        if (has_gates) place_gates(b, fetched);
        __syncthreads();
        prefetch_group(b, b.turn + 1);
        compute_group(b);
    }
}

PlanesParams params_of(const Problem& p, const ToeplitzPlanesTiling& tiling, const Map& agg) {
    PlanesParams params{};
    params.ctx_b = p.ctx.stride_b;
    params.gates_b = p.gates.stride_b;
    params.ctx = p.ctx.data;
    params.gates = p.gates.data;
    params.agg = agg.data;
    params.H = p.H;
    params.W = p.W;
    params.C = p.C;
    params.L = p.L;
    const bool several = tiling.images > 1;
    params.ctx_image = several ? static_cast<int>(p.ctx.stride_b) : 0;
    params.ctx_h = static_cast<int>(p.ctx.stride_h);
    params.ctx_w = static_cast<int>(p.ctx.stride_w);
    params.gates_image = several ? static_cast<int>(p.gates.stride_b) : 0;
    params.gates_h = static_cast<int>(p.gates.stride_h);
    params.gates_w = static_cast<int>(p.gates.stride_w);
    int row = 0;
    for (int l = 0; l < p.L; ++l) {
        const FocalWeight& w = p.weights[l];
        const int rows = toeplitz_plane_tap_rows(w.kh);
        params.level[l] = {w.data, w.kh, w.kw, rows, row};
        row += rows;
    }
    params.ctx_width = widest_vector(p.element, p.C, {p.ctx});
    params.agg_width = widest_vector(p.element, p.C, {agg});
    params.four_gates = p.L == 3 && widest_vector(p.element, 4, {p.gates}) == 4;
    params.scales = p.scale != 1.0f;
    params.scale = p.scale;
    params.share = 1.0f / static_cast<float>(p.H * p.W);
    params.channel_blocks = (p.C + tiling.owned() - 1) / tiling.owned();
    params.groups = static_cast<int>((p.B + tiling.images - 1) / tiling.images);
    params.last_images = static_cast<int>(p.B - static_cast<int64_t>(params.groups - 1) * tiling.images);
    params.gates_at = tiling.rows * toeplitz_plane_row(tiling.blocks, tiling.channels);
    params.taps_at = params.gates_at + (p.L + 1) * toeplitz_gate_plane(tiling.blocks);
    params.tiling = tiling;
    return params;
}

template <typename T, int BLOCKS, int CHANNELS>
Status launch_planes(const PlanesParams& params, cudaStream_t stream) {
    const int64_t blocks = static_cast<int64_t>(params.tiling.programs) * params.channel_blocks;
    return launch("toeplitz_fwd_planes_kernel", toeplitz_fwd_planes_kernel<T, BLOCKS, CHANNELS>, blocks,
                  toeplitz_plane_warps(BLOCKS, CHANNELS) * kWarp, params.tiling.shared_bytes, stream, params);
}

template <typename T, int CHANNELS>
Status launch_channels(const PlanesParams& params, cudaStream_t stream) {
    switch (params.tiling.blocks) {
        case 1:
            return launch_planes<T, 1, CHANNELS>(params, stream);
        case 2:
            return launch_planes<T, 2, CHANNELS>(params, stream);
        case 3:
            return launch_planes<T, 3, CHANNELS>(params, stream);
        case 4:
            return launch_planes<T, 4, CHANNELS>(params, stream);
        default:
            return launch_planes<T, 7, CHANNELS>(params, stream);
    }
}

}  // namespace

template <typename T>
Status toeplitz_planes(const Problem& p, const Map& agg, cudaStream_t stream) {
    const PlanesParams params = params_of(p, plan_toeplitz_planes(p), agg);
    if (params.tiling.channels == 16) return launch_channels<T, 16>(params, stream);
    return launch_channels<T, 8>(params, stream);
}

template Status toeplitz_planes<__half>(const Problem&, const Map&, cudaStream_t);
template Status toeplitz_planes<__nv_bfloat16>(const Problem&, const Map&, cudaStream_t);

}  // namespace focalnet::cuda
