// What a block of toeplitz_fwd_planes.cu keeps in shared memory, and how it fills and empties it: planes and gates of
// a group of images, and the taps.
//
//     planes     [row][8 channels][pitch], 16 bytes more a row: an odd number of 16 bytes, so that eight rows lie in
//                eight quarters of the banks. Images begin H + 8 rows apart. A channel's column -4 comes first
//     gates      [level][56 rows][4][PADDED blocks] of pairs: a lane's pairs of neighbouring blocks in one access
//     taps       [channel][rows of all kernels][14] of four: what the lanes with the same u hold of T, b0 and b1
//     sums       [channel][56] in float32, of the last level's rows; of the only image, eight

#pragma once

#include "launch.cuh"
#include "toeplitz.cuh"
#include "toeplitz.h"

namespace focalnet::cuda {

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
    bool scales;
    float scale;
    int channel_blocks, groups;
    int gates_at, taps_at, sums_at;  // in shared memory, in bytes
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
    int group;                    // of images
    int stacked_rows, stacked_c;  // where registers are left for them

    __device__ __forceinline__ PlanesBlock(const PlanesParams& p, unsigned char* memory)
        : p(p),
          memory(memory),
          group(blockIdx.x / p.channel_blocks),
          stacked_c(blockIdx.x % p.channel_blocks * kChannels) {}
    __device__ __forceinline__ bool take_group() {
        if (group >= p.groups) return false;
        stacked_rows = static_cast<int>(min(static_cast<int64_t>(p.tiling.images), p.B - first_image())) * p.H;
        return true;
    }
    __device__ __forceinline__ int rows() const { return Size::kStacked ? stacked_rows : p.H; }
    __device__ __forceinline__ int64_t first_image() const { return static_cast<int64_t>(group) * p.tiling.images; }
    __device__ __forceinline__ int first_c() const {
        return Size::kStacked ? stacked_c : blockIdx.x % p.channel_blocks * kChannels;
    }
    __device__ __forceinline__ int gates() const { return p.gates_at; }
    __device__ __forceinline__ int taps() const { return p.taps_at; }
    __device__ __forceinline__ int sums() const { return p.sums_at; }
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
    const T* ctx = static_cast<const T*>(p.ctx) + b.first_image() * p.ctx_b + b.first_c();
    const T* gates = static_cast<const T*>(p.gates) + b.first_image() * p.gates_b;
    for_each_pair<BLOCKS>(b.rows(), p.W, [&](int row, int x) {
        const int image = b.image(row), y = row - image * p.H;
        const bool both = x + 1 < p.W;
        const T* from = ctx + (image * p.ctx_image + y * p.ctx_h + x * p.ctx_w);
        const uint4 left = load_eight<T, N>(from, p.C - b.first_c());
        uint4 right{0, 0, 0, 0};
        if (both) right = load_eight<T, N>(from + p.ctx_w, p.C - b.first_c());

        const T* gate = gates + (image * p.gates_image + y * p.gates_h + x * p.gates_w);
        const int swap = BLOCKS > 4 ? row % 2 * 4 : 0;
        const int to = b.gates() + row * Size::kGateRow + 4 * (x % 8 / 2 * Size::kPadded + (x / 8 ^ swap));
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
    T* agg = static_cast<T*>(p.agg) + b.first_image() * p.H * p.W * p.C + b.first_c();
    for_each_pair<BLOCKS>(b.rows(), p.W, [&](int row, int x) {
        const int at = b.plane_row(row) + 2 * kToeplitzPadding + 2 * x;
        uint32_t pairs[kChannels];
#pragma unroll
        for (int c = 0; c < kChannels; ++c) pairs[c] = word_at(b.memory, at + c * Size::kPitch);
        T* to = agg + static_cast<int64_t>(row * p.W + x) * p.C;
        store_eight<T, N>(to,
                          uint4{lows(pairs[0], pairs[1]), lows(pairs[2], pairs[3]), lows(pairs[4], pairs[5]),
                                lows(pairs[6], pairs[7])},
                          p.C - b.first_c());
        if (x + 1 < p.W)
            store_eight<T, N>(to + p.C,
                              uint4{highs(pairs[0], pairs[1]), highs(pairs[2], pairs[3]), highs(pairs[4], pairs[5]),
                                    highs(pairs[6], pairs[7])},
                              p.C - b.first_c());
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
        const T* from =
            static_cast<const T*>(own.weight) + static_cast<int64_t>(b.first_c() + channel) * own.kh * own.kw;
        // Beyond the kernel's columns another tap is read, and masked.
        const int first = u - 7 - (kToeplitzPadding - own.kw / 2);
        int column[4];
        uint32_t mask[2] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int x = first + i % 2 + i / 2 * 8;
            const bool inside = static_cast<unsigned>(x) < static_cast<unsigned>(own.kw);
            column[i] = inside ? x : 0;
            mask[i / 2] |= inside ? 0xffffu << i % 2 * 16 : 0u;
        }
        from += lane / 16 * own.kw;
        unsigned char* to =
            b.memory + b.taps() + 8 * ((channel * p.tiling.tap_rows + own.first_row + lane / 16) * kTapEntries + u);
#pragma unroll 1
        for (int ky = lane / 16; ky < own.kh; ky += 2) {
            const T four[] = {from[column[0]], from[column[1]], from[column[2]], from[column[3]]};
            uint2 words;
            memcpy(&words, four, sizeof words);
            *reinterpret_cast<uint2*>(to) = uint2{words.x & mask[0], words.y & mask[1]};
            from += 2 * own.kw;
            to += 2 * 8 * kTapEntries;
        }
    }
}

}  // namespace focalnet::cuda
