// Gated aggregation, forward, on tensor cores, of small maps: up to 32 columns or 48 to 56, and up to 56 rows of
// one image or of several one above the other. One launch, bfloat16 and float16, kernels of at most nine columns.
//
// toeplitz_fwd_planes_kernel: a block owns sixteen channels or eight, a warp one of them, and takes groups of images
// in turn. A warp needs nobody else between the first level and the last.
//
//     fetch          ctx, channels last, and gates of the next group: all loads at once, into the registers that agg
//                    has left
//     once a block   zeros into the planes, which leaves a halo around every image; the taps of all levels
//     write          the group before: plane -> channels last
//     place          what was fetched -> planes and gates in shared memory; the group after it is called to L2
//     level l        sixteen rows at a time, for BLOCKS blocks of eight columns: plane -> mma -> GELU in registers ->
//                    agg += gate * GELU in registers, and the same rows of the plane. Eight rows wait in registers
//                    until the tile below, which reads them, is done, so one plane does for all levels
//     mean           sums of the last level's rows: a product with ones
//     finish         agg + gate * GELU(mean) -> plane
//
// Bytes: ctx read and agg written once, in whole sectors of 32 bytes with sixteen channels. With eight, which shared
// memory may leave no choice but, two blocks share every sector: L2 moves twice as much. The gates, once for every
// block of channels.

#include "toeplitz_planes.cuh"

namespace focalnet::cuda {
namespace {

// Where a lane's gates of the first four blocks lie, and of the others.
struct LaneGates {
    const unsigned char *first, *second;
};

// What a lane has of its channel: its row in each half of a tile, in BLOCKS blocks of two columns.
template <typename T, int BLOCKS, int CHANNELS>
struct PlanesWarp {
    using Size = Sizes<BLOCKS, CHANNELS>;
    static constexpr int kAddresses = Size::kStacked ? 4 : 1, kPlaces = Size::kStacked ? kHalves : 1;
    int limit;                          // a half that begins before it has the lane's row
    uint32_t mask;                      // of the last block: columns that exist
    SharedAddress sources[kAddresses];  // of the lane's row of ldmatrix, without the kernel's rows above it
    int places[kPlaces];                // of the lane's rows of outputs
    uint32_t agg[kHalves][BLOCKS];

    __device__ __forceinline__ PlanesWarp(const PlanesBlock<T, BLOCKS, CHANNELS>& b) {
        const int thread = thread_index(), lane = thread % kWarp, channel = thread / kWarp;
        const int column = 8 * (BLOCKS - 1) + 2 * (lane % 4);
        mask = (column < b.p.W ? 0xffffu : 0u) | (column + 1 < b.p.W ? 0xffff0000u : 0u);
        const int last = b.p.tiling.images * b.p.H - 1;
#pragma unroll
        for (int i = 0; i < kAddresses; ++i) {
            const int row = Size::kStacked ? min(16 * i + lane % 16, last) : lane % 16;
            sources[i] = shared_address(b.memory + b.plane_row(row) + toeplitz_plane_channel(BLOCKS, channel) +
                                        16 * (lane / 16));
        }
#pragma unroll
        for (int i = 0; i < kPlaces; ++i)
            places[i] = b.plane_row(Size::kStacked ? min(8 * i + lane / 4, last) : lane / 4) +
                        toeplitz_plane_channel(BLOCKS, channel) + 2 * kToeplitzPadding + 4 * (lane % 4);
    }
    __device__ __forceinline__ int lane() const { return threadIdx.x % kWarp; }
    __device__ __forceinline__ int channel() const { return threadIdx.x / kWarp; }
    // Made anew where they are wanted, so that no register holds them while products are summed.
    // Of the lane's row in the first half, in a level. Odd rows have their second four blocks first: two rows in the
    // same banks would be read in turn.
    __device__ __forceinline__ LaneGates gates(const PlanesBlock<T, BLOCKS, CHANNELS>& b, int level) const {
        const int lane = thread_index() % kWarp, swap = BLOCKS > 4 ? lane / 4 % 2 * 16 : 0;
        const unsigned char* row =
            b.memory + b.gates() + level * Size::kGatePlane + lane / 4 * Size::kGateRow + lane % 4 * 4 * Size::kPadded;
        return {row + swap, row + (16 ^ swap)};
    }
    __device__ __forceinline__ int taps(const PlanesBlock<T, BLOCKS, CHANNELS>& b) const {
        const int thread = thread_index(), lane = thread % kWarp;
        return b.taps() + 8 * (thread / kWarp * b.p.tiling.tap_rows * kTapEntries + 2 * (lane % 4) + 7 - lane / 4);
    }
    __device__ __forceinline__ int sums(const PlanesBlock<T, BLOCKS, CHANNELS>& b) const {
        return b.sums() + 4 * channel() * Size::kSums;
    }
    __device__ __forceinline__ SharedAddress source(int tile) const {
        if constexpr (Size::kStacked) return sources[tile];
        return sources[0] + 16 * tile * Size::kRow;
    }
    __device__ __forceinline__ int place_of(int half) const {
        if constexpr (Size::kStacked) return places[half];
        return places[0] + 8 * half * Size::kRow;
    }
};

// A row of the kernel, for kTiles tiles.
template <typename T, int BLOCKS, int TILES>
__device__ __forceinline__ void add_kernel_row(float (&z)[TILES][BLOCKS][4], const SharedAddress (&rows)[TILES],
                                               int offset, const unsigned char* taps) {
    const uint2 b = *reinterpret_cast<const uint2*>(taps);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        uint32_t a[BLOCKS + 1][2];
        const SharedAddress row = rows[tile] + offset;
        // The four registers of a whole product must come from one ldmatrix: every second block takes two halves.
#pragma unroll
        for (int j = 0; j <= BLOCKS; j += 2) {
            if (j < BLOCKS)
                ldmatrix_x4<false>(a[j][0], a[j][1], a[j + 1][0], a[j + 1][1], row + 16 * j);
            else
                ldmatrix_x2<false>(a[j][0], a[j][1], row + 16 * j);
            if (j > 0) mma_half<T>(z[tile][j - 1], a[j][0], a[j][1], b.y);
            if (j < BLOCKS) mma<T>(z[tile][j], a[j][0], a[j][1], a[j + 1][0], a[j + 1][1], b.x, b.y);
            if (j + 1 < BLOCKS) mma_half<T>(z[tile][j + 1], a[j + 1][0], a[j + 1][1], b.x);
        }
    }
}

template <typename T, int BLOCKS, int TILES, int ROW>
__device__ __forceinline__ void convolve_tiles(float (&z)[TILES][BLOCKS][4], SharedAddress (&rows)[TILES],
                                               const unsigned char* taps, int kh) {
    constexpr int kRow = ROW, kTapRow = 8 * kTapEntries;
    // Seven blocks leave no registers for two rows of the kernel at once.
    constexpr int kAtOnce = BLOCKS > 4 ? 1 : 2, kFirst = kAtOnce - 1;
    if constexpr (kFirst == 1) add_kernel_row<T, BLOCKS, TILES>(z, rows, 0, taps);
    const SharedAddress end = rows[0] + (kh - kFirst) * kRow;
#pragma unroll 1
    while (rows[0] != end) {
#pragma unroll
        for (int row = kFirst; row < kFirst + kAtOnce; ++row)
            add_kernel_row<T, BLOCKS, TILES>(z, rows, row * kRow, taps + row * kTapRow);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) rows[tile] += kAtOnce * kRow;
        taps += kAtOnce * kTapRow;
    }
}

// Calls f(block, pair of gates) for the lane's row in a half.
template <int BLOCKS, typename F>
__device__ __forceinline__ void for_each_gate(const LaneGates& gates, int half, F f) {
    constexpr int kHalf = 8 * 16 * toeplitz_gate_blocks(BLOCKS);
    if constexpr (BLOCKS == 1) {
        f(0, load_word(gates.first + kHalf * half));
    } else if constexpr (BLOCKS == 2) {
        const uint2 two = *reinterpret_cast<const uint2*>(gates.first + kHalf * half);
        f(0, two.x);
        f(1, two.y);
    } else {
#pragma unroll
        for (int j = 0; j < BLOCKS; j += 4) {
            const uint4 four = *reinterpret_cast<const uint4*>((j > 0 ? gates.second : gates.first) + kHalf * half);
            f(j, four.x);
            f(j + 1, four.y);
            if (j + 2 < BLOCKS) f(j + 2, four.z);
            if (j + 3 < BLOCKS) f(j + 3, four.w);
        }
    }
}

template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void store_half(const PlanesBlock<T, BLOCKS, CHANNELS>& b,
                                           const PlanesWarp<T, BLOCKS, CHANNELS>& w, int half,
                                           const uint32_t (&pairs)[BLOCKS]) {
    if (Sizes<BLOCKS, CHANNELS>::kStacked ? 8 * half >= w.limit : w.lane() / 4 >= b.rows() - 8 * half) return;
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) word_at(b.memory, w.place_of(half) + 16 * j) = pairs[j];
}

// The sums of a tile's rows, by a product with ones; `sum` as mma's C.
template <typename T, int BLOCKS>
__device__ __forceinline__ void add_rows(float (&sum)[4], const uint32_t (&pairs)[2][BLOCKS]) {
    const uint32_t ones = pair_word<T>(PairOf<T>::from(1.0f, 1.0f));
#pragma unroll
    for (int j = 0; j + 1 < BLOCKS; j += 2)
        mma<T>(sum, pairs[0][j], pairs[1][j], pairs[0][j + 1], pairs[1][j + 1], ones, ones);
    if constexpr (BLOCKS % 2 == 1) mma_half<T>(sum, pairs[0][BLOCKS - 1], pairs[1][BLOCKS - 1], ones);
}

// The sums of the lane's rows in a tile.
template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void keep_sums(const PlanesBlock<T, BLOCKS, CHANNELS>& b,
                                          const PlanesWarp<T, BLOCKS, CHANNELS>& w, int tile, float upper,
                                          float lower) {
    if (w.lane() % 4 != 0) return;
    const int row = 16 * tile + w.lane() / 4;
    float* sums = reinterpret_cast<float*>(b.memory + w.sums(b));
    if constexpr (Sizes<BLOCKS, CHANNELS>::kStacked) {
        sums[row] = upper;
        if (2 * tile + 1 < kHalves) sums[row + 8] = lower;
    } else {
        const float sum = (row < b.rows() ? upper : 0.0f) + (row + 8 < b.rows() ? lower : 0.0f);
        sums[w.lane() / 4] = tile > 0 ? sums[w.lane() / 4] + sum : sum;
    }
}

// A level of the warp's channel. The last one leaves the sums of its rows instead of a plane.
template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void run_plane_level(const PlanesBlock<T, BLOCKS, CHANNELS>& b,
                                                PlanesWarp<T, BLOCKS, CHANNELS>& w, int level) {
    using Size = Sizes<BLOCKS, CHANNELS>;
    constexpr int kTiles = Size::kTiles;
    const PlanesParams& p = b.p;
    const bool is_last = level + 1 == p.L;
    const int kh = p.level[level].kh;
    const unsigned char* taps = b.memory + w.taps(b) + p.level[level].first_row * 8 * kTapEntries;
    uint32_t held[BLOCKS] = {};
#pragma unroll
    for (int chunk = 0; chunk < Size::kChunks; ++chunk) {
        float z[kTiles][BLOCKS][4] = {};
        SharedAddress rows[kTiles];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) rows[tile] = w.source(chunk * kTiles + tile) - kh / 2 * Size::kRow;
        convolve_tiles<T, BLOCKS, kTiles, Size::kRow>(z, rows, taps, kh);
        __syncwarp();  // nobody reads the rows above any more
        if (chunk > 0 && !is_last) store_half(b, w, 2 * kTiles * chunk - 1, held);
        const LaneGates gates = w.gates(b, level);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            uint32_t pairs[2][BLOCKS] = {};
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const int half = 2 * (chunk * kTiles + tile) + part;
                if (half >= kHalves) continue;
#pragma unroll
                for (int j = 0; j < BLOCKS; ++j)
                    pairs[part][j] = pair_word<T>(gelu_packed<T>(z[tile][j][2 * part], z[tile][j][2 * part + 1]));
                // What lies beyond the map's columns is zero for the next level.
                pairs[part][BLOCKS - 1] &= w.mask;
                for_each_gate<BLOCKS>(gates, half, [&](int j, uint32_t gate) {
                    w.agg[half][j] = fma_pair<T>(gate, pairs[part][j], w.agg[half][j]);
                });
                if (is_last) continue;
                if (part == 1 && tile + 1 == kTiles && half + 1 < kHalves) {
#pragma unroll
                    for (int j = 0; j < BLOCKS; ++j) held[j] = pairs[1][j];
                } else {
                    store_half(b, w, half, pairs[part]);
                }
            }
            if (is_last) {
                float sum[4] = {};
                add_rows<T, BLOCKS>(sum, pairs);
                keep_sums(b, w, chunk * kTiles + tile, sum[0], sum[2]);
            }
        }
    }
    __syncwarp();  // the sums are there
}

// Puts GELU of its image's mean, twice in a word, in the place of each sum. Equal shares of the warp's lanes take an
// image each.
template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void form_means(const PlanesBlock<T, BLOCKS, CHANNELS>& b,
                                           const PlanesWarp<T, BLOCKS, CHANNELS>& w) {
    using Size = Sizes<BLOCKS, CHANNELS>;
    const PlanesParams& p = b.p;
    const int share = Size::kStacked ? kWarp / p.tiling.images : kWarp, image = Size::kStacked ? w.lane() / share : 0;
    const int count = Size::kStacked ? p.H : Size::kSums, first = w.lane() % share;
    const int sums = w.sums(b) + 4 * image * p.H;
    float sum = 0.0f;
    for (int i = first; i < count; i += share) sum += *reinterpret_cast<const float*>(b.memory + sums + 4 * i);
    for (int lanes = share / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    const float value = gelu(sum * (1.0f / static_cast<float>(p.H * p.W)));
    const uint32_t mean = pair_word<T>(PairOf<T>::from(value, value));
    for (int i = first; i < count; i += share) word_at(b.memory, sums + 4 * i) = mean;
    __syncwarp();
}

template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void finish_planes(const PlanesBlock<T, BLOCKS, CHANNELS>& b,
                                              PlanesWarp<T, BLOCKS, CHANNELS>& w) {
    using Size = Sizes<BLOCKS, CHANNELS>;
    const PlanesParams& p = b.p;
    const LaneGates gates = w.gates(b, p.L);
    const unsigned char* means = b.memory + w.sums(b) + 4 * (w.lane() / 4);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
        const uint32_t mean = load_word(means + (Size::kStacked ? 32 * half : 0));
        for_each_gate<BLOCKS>(gates, half,
                              [&](int j, uint32_t gate) { w.agg[half][j] = fma_pair<T>(gate, mean, w.agg[half][j]); });
        if (p.scales) {
#pragma unroll
            for (int j = 0; j < BLOCKS; ++j) {
                typename PairOf<T>::type pair;
                memcpy(&pair, &w.agg[half][j], sizeof pair);
                const float2 both = load_pair(reinterpret_cast<const T*>(&pair));
                w.agg[half][j] = pair_word<T>(PairOf<T>::from(p.scale * both.x, p.scale * both.y));
            }
        }
        w.agg[half][BLOCKS - 1] &= w.mask;
        store_half(b, w, half, w.agg[half]);
    }
}

template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void compute_group(const PlanesBlock<T, BLOCKS, CHANNELS>& b) {
    PlanesWarp<T, BLOCKS, CHANNELS> w(b);
    w.limit = b.rows() - w.lane() / 4;
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j) w.agg[half][j] = 0;
#pragma unroll 1
    for (int level = 0; level < b.p.L; ++level) run_plane_level(b, w, level);
    form_means(b, w);
    finish_planes(b, w);
}

template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void set_up(const PlanesBlock<T, BLOCKS, CHANNELS>& b) {
    const int thread = thread_index(), channel = thread / kWarp;
    zero(reinterpret_cast<T*>(b.memory), b.gates() / 2, thread, Sizes<BLOCKS, CHANNELS>::kThreads);
    // Beyond C nothing is stored, whatever the warp makes of taps that it does not have.
    if (b.first_c() + channel < b.p.C) write_plane_taps(b, channel);
}

template <typename T, int BLOCKS, int CHANNELS>
__global__ void __launch_bounds__(CHANNELS* kWarp, toeplitz_planes_resident(BLOCKS, CHANNELS))
    toeplitz_fwd_planes_kernel(const PlanesParams p) {
    FOCALNET_SHARED_MEMORY(memory);
    PlanesBlock<T, BLOCKS, CHANNELS> b(p, memory);
#pragma unroll 1
    while (true) {
        const int group = b.next_group();
        const bool more = group < p.groups;
        Fetched<BLOCKS, CHANNELS> fetched{};
        if (more) {
            if (p.ctx_width == kPart) fetch_ctx(b, group, fetched);
            if (p.four_gates)
                fetch_gates<T, BLOCKS, CHANNELS, true>(b, group, fetched);
            else
                fetch_gates<T, BLOCKS, CHANNELS, false>(b, group, fetched);
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
        b.take_next();
        if (p.ctx_width == kPart)
            place_ctx(b, fetched);
        else if (p.ctx_width == 4)
            read_ctx<T, BLOCKS, CHANNELS, 4>(b);
        else
            read_ctx<T, BLOCKS, CHANNELS, 1>(b);
        place_gates(b, fetched);
        __syncthreads();
        prefetch_group(b, b.next_group());
        compute_group(b);
    }
}

PlanesParams params_of(const Problem& p, const ToeplitzPlanesTiling& tiling, const Map& agg) {
    PlanesParams params{};
    params.B = p.B;
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
        params.level[l] = {w.data, w.kh, w.kw, row};
        row += w.kh;
    }
    params.ctx_width = widest_vector(p.element, p.C, {p.ctx});
    params.agg_width = widest_vector(p.element, p.C, {agg});
    params.four_gates = p.L == 3 && widest_vector(p.element, 4, {p.gates}) == 4;
    params.scales = p.scale != 1.0f;
    params.scale = p.scale;
    params.channel_blocks = (p.C + tiling.channels - 1) / tiling.channels;
    params.groups = static_cast<int>((p.B + tiling.images - 1) / tiling.images);
    params.gates_at = tiling.rows * toeplitz_plane_row(tiling.blocks, tiling.channels);
    params.taps_at = params.gates_at + (p.L + 1) * kRows * 16 * toeplitz_gate_blocks(tiling.blocks);
    params.sums_at = params.taps_at + tiling.channels * row * 8 * kTapEntries;
    params.tiling = tiling;
    return params;
}

template <typename T, int BLOCKS, int CHANNELS>
Status launch_planes(const PlanesParams& params, cudaStream_t stream) {
    const int64_t blocks = static_cast<int64_t>(params.tiling.programs) * params.channel_blocks;
    return launch("toeplitz_fwd_planes_kernel", toeplitz_fwd_planes_kernel<T, BLOCKS, CHANNELS>, blocks,
                  CHANNELS * kWarp, params.tiling.shared_bytes, stream, params);
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
