// Gated aggregation, forward, on tensor cores, of small maps: up to 56 columns, and up to 56 rows of one image or of
// several one above the other. One launch, bfloat16 and float16, kernels of at most nine columns.
//
// toeplitz_fwd_planes_kernel: a block owns eight channels, a warp one of them, and takes groups of images in turn. A
// warp needs nobody else between the first level and the last.
//
//     once a block   zeros into the planes, which leaves a halo around every image; the taps of all levels
//     read           ctx of a group, channels last, turned into planes; its gates
//     level l        sixteen rows at a time, for BLOCKS blocks of eight columns: plane -> mma -> GELU in registers ->
//                    agg += gate * GELU in registers, and the same rows of the plane. Eight rows wait in registers
//                    until the tile below, which reads them, is done, so one plane does for all levels
//     mean           sums of the last level's rows: a product with ones
//     write          agg + gate * GELU(mean) -> plane -> channels last
//
//     in shared memory
//         planes     [row][8 channels][pitch], 16 bytes more a row: an odd number of 16 bytes, so that eight rows lie
//                    in eight quarters of the banks. Images begin H + 8 rows apart. A channel's column -4 comes first
//         gates      [level][56 rows][4][PADDED blocks] of pairs: a lane's pairs of neighbouring blocks in one access
//         taps       [channel][rows of all kernels][14] of four: what the lanes with the same u hold of T, b0 and b1
//
// Bytes: ctx read and agg written once; the gates, once for every eight channels. Two blocks of neighbouring channels
// share sectors of 32 bytes.

#include "launch.cuh"
#include "toeplitz.cuh"
#include "toeplitz.h"

namespace focalnet::cuda {
namespace {

constexpr int kChannels = kToeplitzPlaneChannels, kRows = kToeplitzPlaneRows;
constexpr int kHalves = kRows / 8;  // of tiles: a lane has one row in each
constexpr int kBlockThreads = kChannels * kWarp;
constexpr int kTapEntries = 14;

struct PlanesLevel {
    const void* weight;
    int kh, kw, first_row;  // of the taps
};

struct PlanesParams {
    int64_t B, ctx_b, gates_b;  // strides from image to image
    const void *ctx, *gates;
    void* agg;  // contiguous
    int H, W, C, L;
    int ctx_image, ctx_h, ctx_w, gates_image, gates_h, gates_w;  // strides again, within a group of images
    PlanesLevel level[kMaxLevels];
    int ctx_width, agg_width;
    bool four_gates;  // lie in 8 bytes, aligned
    float scale;
    ToeplitzPlanesTiling tiling;
};

template <int BLOCKS>
struct Sizes {
    static constexpr bool kStacked = toeplitz_planes_stacked(BLOCKS);
    static constexpr int kTiles = BLOCKS <= 2 ? 4 : BLOCKS <= 4 ? 2 : 1;  // of sixteen rows, at once
    static constexpr int kChunks = (kHalves + 1) / 2 / kTiles;
    // Sums of the last level that a warp keeps: of every row, or of every eighth of the only image.
    static constexpr int kSums = toeplitz_plane_sums(BLOCKS);
    static constexpr int kPitch = toeplitz_plane_pitch(BLOCKS);  // bytes, as all that follows
    static constexpr int kRow = kChannels * kPitch + 16;
    static constexpr int kPadded = toeplitz_gate_blocks(BLOCKS);
    static constexpr int kGateRow = 16 * kPadded;
    static constexpr int kGatePlane = kRows * kGateRow;
    // Of positions, two columns each: lanes side by side, and rows that a block takes at once.
    static constexpr int kAcross = BLOCKS == 1 ? 4 : BLOCKS == 2 ? 8 : BLOCKS <= 4 ? 16 : 32;
    static constexpr int kRowsAtOnce = kBlockThreads / kAcross;
};

__device__ __forceinline__ uint32_t& word_at(unsigned char* memory, int at) {
    return *reinterpret_cast<uint32_t*>(memory + at);
}

// The low or the high elements of two pairs.
__device__ __forceinline__ uint32_t lows(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t highs(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

template <typename T>
__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
    typename PairOf<T>::type x, y, z;
    memcpy(&x, &a, sizeof x);
    memcpy(&y, &b, sizeof y);
    memcpy(&z, &c, sizeof z);
    x = __hfma2(x, y, z);
    memcpy(&a, &x, sizeof a);
    return a;
}

template <typename T>
__device__ __forceinline__ uint32_t pair_word(typename PairOf<T>::type pair) {
    uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
}

// The block's share of the problem, and where everything lies in shared memory, in bytes.
template <typename T, int BLOCKS>
struct PlanesBlock {
    using Size = Sizes<BLOCKS>;
    const PlanesParams& p;
    unsigned char* memory;
    int first_c, gates, taps, sums;
    int64_t first_image;
    int rows;  // of the group's images

    __device__ __forceinline__ PlanesBlock(const PlanesParams& p, unsigned char* memory) : p(p), memory(memory) {
        const int blocks = (p.C + kChannels - 1) / kChannels;
        first_c = static_cast<int>(blockIdx.x % blocks) * kChannels;
        first_image = static_cast<int64_t>(blockIdx.x / blocks) * p.tiling.images;
        gates = p.tiling.rows * Size::kRow;
        taps = gates + (p.L + 1) * Size::kGatePlane;
        sums = taps + kChannels * p.tiling.tap_rows * 8 * kTapEntries;
    }
    __device__ __forceinline__ bool take_group() {
        if (first_image >= p.B) return false;
        rows = static_cast<int>(min(static_cast<int64_t>(p.tiling.images), p.B - first_image)) * p.H;
        return true;
    }
    __device__ __forceinline__ int image(int row) const {
        return Size::kStacked ? static_cast<int>(row * p.tiling.inverse >> 16) : 0;
    }
    // Bytes from the planes' beginning to a row of the group.
    __device__ __forceinline__ int plane_row(int row) const {
        return (p.tiling.halo + row + kToeplitzImageGap * image(row)) * Size::kRow;
    }
};

// Of two neighbouring columns and eight channels, from `from` on: those before C.
template <typename T, int N>
__device__ __forceinline__ uint4 load_eight(const T* from, int channels) {
    T values[kChannels] = {};
#pragma unroll
    for (int c = 0; c < kChannels; c += N)
        if (c < channels) {
            T part[N];
            load_raw<N>(from + c, part);
            memcpy(values + c, part, sizeof part);
        }
    uint4 result;
    memcpy(&result, values, sizeof result);
    return result;
}

template <typename T, int N>
__device__ __forceinline__ void store_eight(T* to, const uint4& from, int channels) {
    using Raw = typename RawOf<N * sizeof(T)>::type;
    T values[kChannels];
    memcpy(values, &from, sizeof values);
#pragma unroll
    for (int c = 0; c < kChannels; c += N)
        if (c < channels) {
            Raw raw;
            memcpy(&raw, values + c, sizeof raw);
            *reinterpret_cast<Raw*>(to + c) = raw;
        }
}

// Calls f(row, x) for every row of the group and every second column.
template <int BLOCKS, typename F>
__device__ __forceinline__ void for_each_pair(int rows, int columns, F f) {
    using Size = Sizes<BLOCKS>;
    const int x = 2 * (threadIdx.x % Size::kAcross);
    if (x >= columns) return;
#pragma unroll 2
    for (int row = threadIdx.x / Size::kAcross; row < rows; row += Size::kRowsAtOnce) f(row, x);
}

template <typename T, int BLOCKS, int N>
__device__ __forceinline__ void read_group(const PlanesBlock<T, BLOCKS>& b) {
    using Size = Sizes<BLOCKS>;
    const PlanesParams& p = b.p;
    const T* ctx = static_cast<const T*>(p.ctx) + b.first_image * p.ctx_b + b.first_c;
    const T* gates = static_cast<const T*>(p.gates) + b.first_image * p.gates_b;
    for_each_pair<BLOCKS>(b.rows, p.W, [&](int row, int x) {
        const int image = b.image(row), y = row - image * p.H;
        const bool both = x + 1 < p.W;
        const T* from = ctx + (image * p.ctx_image + y * p.ctx_h + x * p.ctx_w);
        const uint4 left = load_eight<T, N>(from, p.C - b.first_c);
        uint4 right{0, 0, 0, 0};
        if (both) right = load_eight<T, N>(from + p.ctx_w, p.C - b.first_c);

        const T* gate = gates + (image * p.gates_image + y * p.gates_h + x * p.gates_w);
        const int swap = BLOCKS > 4 ? row % 2 * 4 : 0;
        const int to = b.gates + row * Size::kGateRow + 4 * (x % 8 / 2 * Size::kPadded + (x / 8 ^ swap));
        if (p.four_gates) {
            const uint2 l = *reinterpret_cast<const uint2*>(gate);
            uint2 r{0, 0};
            if (both) r = *reinterpret_cast<const uint2*>(gate + p.gates_w);
            word_at(b.memory, to) = lows(l.x, r.x);
            word_at(b.memory, to + Size::kGatePlane) = highs(l.x, r.x);
            word_at(b.memory, to + 2 * Size::kGatePlane) = lows(l.y, r.y);
            word_at(b.memory, to + 3 * Size::kGatePlane) = highs(l.y, r.y);
        } else {
            for (int l = 0; l <= p.L; ++l) {
                const T pair[] = {gate[l], both ? gate[l + p.gates_w] : from_float<T>(0.0f)};
                memcpy(b.memory + to + l * Size::kGatePlane, pair, sizeof pair);
            }
        }

        const int at = b.plane_row(row) + 2 * kToeplitzPadding + 2 * x;
        const uint32_t l[] = {left.x, left.y, left.z, left.w}, r[] = {right.x, right.y, right.z, right.w};
#pragma unroll
        for (int c = 0; c < kChannels; c += 2) {
            word_at(b.memory, at + c * Size::kPitch) = lows(l[c / 2], r[c / 2]);
            word_at(b.memory, at + (c + 1) * Size::kPitch) = highs(l[c / 2], r[c / 2]);
        }
    });
}

template <typename T, int BLOCKS, int N>
__device__ __forceinline__ void write_group(const PlanesBlock<T, BLOCKS>& b) {
    using Size = Sizes<BLOCKS>;
    const PlanesParams& p = b.p;
    T* agg = static_cast<T*>(p.agg) + b.first_image * p.H * p.W * p.C + b.first_c;
    for_each_pair<BLOCKS>(b.rows, p.W, [&](int row, int x) {
        const int at = b.plane_row(row) + 2 * kToeplitzPadding + 2 * x;
        uint32_t pairs[kChannels];
#pragma unroll
        for (int c = 0; c < kChannels; ++c) pairs[c] = word_at(b.memory, at + c * Size::kPitch);
        T* to = agg + static_cast<int64_t>(row * p.W + x) * p.C;
        store_eight<T, N>(to,
                             uint4{lows(pairs[0], pairs[1]), lows(pairs[2], pairs[3]), lows(pairs[4], pairs[5]),
                                   lows(pairs[6], pairs[7])},
                             p.C - b.first_c);
        if (x + 1 < p.W)
            store_eight<T, N>(to + p.C,
                                 uint4{highs(pairs[0], pairs[1]), highs(pairs[2], pairs[3]),
                                       highs(pairs[4], pairs[5]), highs(pairs[6], pairs[7])},
                                 p.C - b.first_c);
    });
}

// The taps of the warp's channel, for every u = 2 * (lane % 4) + 7 - lane / 4 (toeplitz.cuh). Half a warp takes a row.
template <typename T, int BLOCKS>
__device__ __forceinline__ void write_plane_taps(const PlanesBlock<T, BLOCKS>& b, int channel) {
    const PlanesParams& p = b.p;
    const int lane = threadIdx.x % kWarp, u = lane % 16;
    if (u >= kTapEntries) return;
    for (int level = 0; level < p.L; ++level) {
        const PlanesLevel& own = p.level[level];
        const T* from = static_cast<const T*>(own.weight) + static_cast<int64_t>(b.first_c + channel) * own.kh * own.kw;
        const int first = u - 7 - (kToeplitzPadding - own.kw / 2);
        const auto tap = [&](int ky, int x) {
            return static_cast<unsigned>(x) < static_cast<unsigned>(own.kw) ? from[ky * own.kw + x]
                                                                            : from_float<T>(0.0f);
        };
#pragma unroll 1
        for (int ky = lane / 16; ky < own.kh; ky += 2) {
            const T four[] = {tap(ky, first), tap(ky, first + 1), tap(ky, first + 8), tap(ky, first + 9)};
            const int row = channel * p.tiling.tap_rows + own.first_row + ky;
            uint2 words;
            memcpy(&words, four, sizeof words);
            *reinterpret_cast<uint2*>(b.memory + b.taps + 8 * (row * kTapEntries + u)) = words;
        }
    }
}

// What a lane has of its channel: its row in each half of a tile, in BLOCKS blocks of two columns.
template <typename T, int BLOCKS>
struct PlanesWarp {
    using Size = Sizes<BLOCKS>;
    static constexpr int kAddresses = Size::kStacked ? 4 : 2, kPlaces = Size::kStacked ? kHalves : 1;
    int lane, channel;
    uint32_t mask;                     // of the last block: columns that exist
    SharedAddress sources[kAddresses];  // of the lane's row of ldmatrix, without the kernel's rows above it
    int places[kPlaces];               // of the lane's rows of outputs
    int gates, taps, sums;
    uint32_t agg[kHalves][BLOCKS];

    __device__ __forceinline__ PlanesWarp(const PlanesBlock<T, BLOCKS>& b)
        : lane(threadIdx.x % kWarp), channel(threadIdx.x / kWarp) {
        const int column = 8 * (BLOCKS - 1) + 2 * (lane % 4);
        mask = (column < b.p.W ? 0xffffu : 0u) | (column + 1 < b.p.W ? 0xffff0000u : 0u);
        sums = b.sums + 4 * channel * Size::kSums;
        gates = b.gates + lane / 4 * Size::kGateRow + lane % 4 * 4 * Size::kPadded;
        taps = b.taps + 8 * (channel * b.p.tiling.tap_rows * kTapEntries + 2 * (lane % 4) + 7 - lane / 4);
        const int last = b.p.tiling.images * b.p.H - 1;
#pragma unroll
        for (int i = 0; i < kAddresses; ++i) {
            const int tile = Size::kStacked ? i : 3 * i;
            const int row = min(16 * tile + lane % 16, last);
            sources[i] = shared_address(b.memory + b.plane_row(row) + channel * Size::kPitch + 16 * (lane / 16));
        }
#pragma unroll
        for (int i = 0; i < kPlaces; ++i)
            places[i] = b.plane_row(min(8 * i + lane / 4, last)) + channel * Size::kPitch + 2 * kToeplitzPadding +
                        4 * (lane % 4);
    }
    __device__ __forceinline__ SharedAddress source(int tile) const {
        if constexpr (Size::kStacked) return sources[tile];
        return tile == 3 ? sources[1] : sources[0] + 16 * tile * Size::kRow;
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
#pragma unroll
        for (int i = 0; i < BLOCKS; i += 2)
            ldmatrix_x4<false>(a[i][0], a[i][1], a[i + 1][0], a[i + 1][1], row + 16 * i);
        if constexpr (BLOCKS % 2 == 0) ldmatrix_x2<false>(a[BLOCKS][0], a[BLOCKS][1], row + 16 * BLOCKS);
        // The four registers of a whole product must come from one ldmatrix.
#pragma unroll
        for (int j = 0; j < BLOCKS; j += 2) mma<T>(z[tile][j], a[j][0], a[j][1], a[j + 1][0], a[j + 1][1], b.x, b.y);
#pragma unroll
        for (int j = 1; j < BLOCKS; j += 2) mma_half<T>(z[tile][j], a[j][0], a[j][1], b.x);
#pragma unroll
        for (int j = 1; j < BLOCKS; j += 2) mma_half<T>(z[tile][j], a[j + 1][0], a[j + 1][1], b.y);
    }
}

template <typename T, int BLOCKS, int TILES>
__device__ __forceinline__ void convolve_tiles(float (&z)[TILES][BLOCKS][4], SharedAddress (&rows)[TILES],
                                               const unsigned char* taps, int kh) {
    constexpr int kRow = Sizes<BLOCKS>::kRow, kTapRow = 8 * kTapEntries;
    add_kernel_row<T, BLOCKS, TILES>(z, rows, 0, taps);
#pragma unroll 1
    for (int two = kh / 2; two > 0; --two) {
        add_kernel_row<T, BLOCKS, TILES>(z, rows, kRow, taps + kTapRow);
        add_kernel_row<T, BLOCKS, TILES>(z, rows, 2 * kRow, taps + 2 * kTapRow);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) rows[tile] += 2 * kRow;
        taps += 2 * kTapRow;
    }
}

// Calls f(block, pair of gates) for the lane's row in one half.
template <int BLOCKS, typename F>
__device__ __forceinline__ void for_each_gate(const unsigned char* gates, int lane, F f) {
    if constexpr (BLOCKS == 1) {
        f(0, load_word(gates));
    } else if constexpr (BLOCKS == 2) {
        const uint2 two = *reinterpret_cast<const uint2*>(gates);
        f(0, two.x);
        f(1, two.y);
    } else {
#pragma unroll
        for (int j = 0; j < BLOCKS; j += 4) {
            // Odd rows have their second four blocks first: two rows in the same banks would be read in turn.
            const int swap = BLOCKS > 4 ? lane / 4 % 2 * 16 : 0;
            const uint4 four = *reinterpret_cast<const uint4*>(gates + (4 * j ^ swap));
            f(j, four.x);
            f(j + 1, four.y);
            if (j + 2 < BLOCKS) f(j + 2, four.z);
            if (j + 3 < BLOCKS) f(j + 3, four.w);
        }
    }
}

template <typename T, int BLOCKS>
__device__ __forceinline__ void store_half(const PlanesBlock<T, BLOCKS>& b, const PlanesWarp<T, BLOCKS>& w, int half,
                                           const uint32_t (&pairs)[BLOCKS]) {
    if (8 * half + w.lane / 4 >= b.rows) return;
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
template <typename T, int BLOCKS>
__device__ __forceinline__ void keep_sums(const PlanesBlock<T, BLOCKS>& b, const PlanesWarp<T, BLOCKS>& w, int tile,
                                          float upper, float lower) {
    if (w.lane % 4 != 0) return;
    const int row = 16 * tile + w.lane / 4;
    float* sums = reinterpret_cast<float*>(b.memory + w.sums);
    if constexpr (Sizes<BLOCKS>::kStacked) {
        sums[row] = upper;
        if (2 * tile + 1 < kHalves) sums[row + 8] = lower;
    } else {
        const float sum = (row < b.rows ? upper : 0.0f) + (row + 8 < b.rows ? lower : 0.0f);
        sums[w.lane / 4] = tile > 0 ? sums[w.lane / 4] + sum : sum;
    }
}

// A level of the warp's channel. The last one leaves the sums of its rows instead of a plane.
template <typename T, int BLOCKS>
__device__ __forceinline__ void run_plane_level(const PlanesBlock<T, BLOCKS>& b, PlanesWarp<T, BLOCKS>& w, int level) {
    using Size = Sizes<BLOCKS>;
    constexpr int kTiles = Size::kTiles;
    const PlanesParams& p = b.p;
    const bool is_last = level + 1 == p.L;
    const int kh = p.level[level].kh;
    const unsigned char* gates = b.memory + w.gates + level * Size::kGatePlane;
    const unsigned char* taps = b.memory + w.taps + p.level[level].first_row * 8 * kTapEntries;
    uint32_t held[BLOCKS] = {};
#pragma unroll
    for (int chunk = 0; chunk < Size::kChunks; ++chunk) {
        float z[kTiles][BLOCKS][4] = {};
        SharedAddress rows[kTiles];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) rows[tile] = w.source(chunk * kTiles + tile) - kh / 2 * Size::kRow;
        convolve_tiles<T, BLOCKS, kTiles>(z, rows, taps, kh);
        __syncwarp();  // nobody reads the rows above any more
        if (chunk > 0 && !is_last) store_half(b, w, 2 * kTiles * chunk - 1, held);
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
                for_each_gate<BLOCKS>(gates + 8 * half * Size::kGateRow, w.lane, [&](int j, uint32_t gate) {
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
    __syncwarp();
}

// Puts GELU of its image's mean, twice in a word, in the place of each sum. Equal shares of the warp's lanes take an
// image each.
template <typename T, int BLOCKS>
__device__ __forceinline__ void form_means(const PlanesBlock<T, BLOCKS>& b, const PlanesWarp<T, BLOCKS>& w) {
    using Size = Sizes<BLOCKS>;
    const PlanesParams& p = b.p;
    const int share = Size::kStacked ? kWarp / p.tiling.images : kWarp, image = Size::kStacked ? w.lane / share : 0;
    const int count = Size::kStacked ? p.H : Size::kSums, first = w.lane % share;
    const int sums = w.sums + 4 * image * p.H;
    float sum = 0.0f;
    for (int i = first; i < count; i += share) sum += *reinterpret_cast<const float*>(b.memory + sums + 4 * i);
    for (int lanes = share / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    const float value = gelu(sum * (1.0f / static_cast<float>(p.H * p.W)));
    const uint32_t mean = pair_word<T>(PairOf<T>::from(value, value));
    for (int i = first; i < count; i += share) word_at(b.memory, sums + 4 * i) = mean;
    __syncwarp();
}

template <typename T, int BLOCKS>
__device__ __forceinline__ void finish_planes(const PlanesBlock<T, BLOCKS>& b, PlanesWarp<T, BLOCKS>& w) {
    using Size = Sizes<BLOCKS>;
    const PlanesParams& p = b.p;
    const unsigned char* gates = b.memory + w.gates + p.L * Size::kGatePlane;
    const unsigned char* means = b.memory + w.sums + 4 * (w.lane / 4);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
        const uint32_t mean = load_word(means + (Size::kStacked ? 32 * half : 0));
        for_each_gate<BLOCKS>(gates + 8 * half * Size::kGateRow, w.lane, [&](int j, uint32_t gate) {
            w.agg[half][j] = fma_pair<T>(gate, mean, w.agg[half][j]);
        });
        if (p.scale != 1.0f) {
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

template <typename T, int BLOCKS>
__global__ void __launch_bounds__(kBlockThreads, toeplitz_planes_resident(BLOCKS)) toeplitz_fwd_planes_kernel(const PlanesParams p) {
    FOCALNET_SHARED_MEMORY(memory);
    PlanesBlock<T, BLOCKS> b(p, memory);
    PlanesWarp<T, BLOCKS> w(b);
    const bool exists = b.first_c + w.channel < p.C;
    zero(reinterpret_cast<T*>(memory), b.gates / 2, threadIdx.x, kBlockThreads);
    if (exists) write_plane_taps(b, w.channel);
    for (; b.take_group(); b.first_image += static_cast<int64_t>(p.tiling.programs) * p.tiling.images) {
        __syncthreads();
        with_width<T>(p.ctx_width, [&](auto width) { read_group<T, BLOCKS, decltype(width)::value>(b); });
        __syncthreads();
        if (exists) {
#pragma unroll
            for (int half = 0; half < kHalves; ++half)
#pragma unroll
                for (int j = 0; j < BLOCKS; ++j) w.agg[half][j] = 0;
#pragma unroll 1
            for (int level = 0; level < p.L; ++level) run_plane_level(b, w, level);
            form_means(b, w);
            finish_planes(b, w);
        }
        __syncthreads();
        with_width<T>(p.agg_width, [&](auto width) { write_group<T, BLOCKS, decltype(width)::value>(b); });
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
    params.scale = p.scale;
    params.tiling = tiling;
    return params;
}

template <typename T, int BLOCKS>
Status launch_planes(const PlanesParams& params, cudaStream_t stream) {
    const int64_t blocks = static_cast<int64_t>(params.tiling.programs) * ((params.C + kChannels - 1) / kChannels);
    return launch("toeplitz_fwd_planes_kernel", toeplitz_fwd_planes_kernel<T, BLOCKS>, blocks, kBlockThreads,
                  params.tiling.shared_bytes, stream, params);
}

}  // namespace

template <typename T>
Status toeplitz_planes(const Problem& p, const Map& agg, cudaStream_t stream) {
    const PlanesParams params = params_of(p, plan_toeplitz_planes(p), agg);
    switch (params.tiling.blocks) {
        case 1:
            return launch_planes<T, 1>(params, stream);
        case 2:
            return launch_planes<T, 2>(params, stream);
        case 3:
            return launch_planes<T, 3>(params, stream);
        case 4:
            return launch_planes<T, 4>(params, stream);
        case 6:
            return launch_planes<T, 6>(params, stream);
        default:
            return launch_planes<T, 7>(params, stream);
    }
}

template Status toeplitz_planes<__half>(const Problem&, const Map&, cudaStream_t);
template Status toeplitz_planes<__nv_bfloat16>(const Problem&, const Map&, cudaStream_t);

}  // namespace focalnet::cuda
