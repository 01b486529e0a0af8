// What a block of toeplitz_fwd_planes.cu keeps in shared memory, and how it fills and empties it: planes and gates of
// a group of images, and the taps.
//
//     planes     [row][channels][pitch], 16 bytes more a row and 64 more after eight channels: an odd number of 16
//                bytes, so that every seventh row lies in another eighth of the banks. A group has 56 rows: an image
//                takes 7, 14, 28 or all of them, whatever its height, and eight rows of zeros lie between images. A
//                channel's column -4 comes first
//     gates      [level][blocks / 4][56 rows][4][up to 4 blocks] of pairs: a lane's of neighbouring blocks in one
//     access taps       [channel][rows of all kernels][14] of four: what the lanes with the same u hold of T, b0 and
//     b1
//
// A thread has two neighbouring columns and eight channels of every kRowsAtOnce-th row. Of sixteen channels, two
// neighbouring lanes take the two halves of a position's 32 bytes. A group is fetched into registers, all loads at
// once, while the one before it is written.

#pragma once

#include "async_copy.cuh"
#include "launch.cuh"
#include "toeplitz.cuh"
#include "toeplitz.h"

namespace focalnet::cuda {

constexpr int kRows = kToeplitzPlaneRows, kSets = kToeplitzPlaneSets;
constexpr int kPart = 8;  // channels of a thread: 16 bytes of a position
constexpr int kTapEntries = 14, kTapRow = 8 * kTapEntries;

struct PlanesLevel {
    const void* weight;
    int kh, kw, rows, first_row;  // rows and the first of them: of the taps
};

struct PlanesParams {
    int64_t ctx_b, gates_b;  // strides from image to image
    const void *ctx, *gates;
    void* agg;  // contiguous
    int H, W, C, L;
    int ctx_image, ctx_h, ctx_w, gates_image, gates_h, gates_w;  // strides again, within a group of images
    PlanesLevel level[kMaxLevels];
    int ctx_width, agg_width;
    bool four_gates;  // lie in 8 bytes, aligned
    bool scales;
    float scale, share;                       // share: of a position in the mean
    int channel_blocks, groups, last_images;  // of the last group
    int gates_at, taps_at;                    // in shared memory, in bytes
    ToeplitzPlanesTiling tiling;
};

constexpr int trips(int rows_at_once) { return (kRows + rows_at_once - 1) / rows_at_once; }

template <int BLOCKS, int CHANNELS>
struct Sizes {
    static constexpr int kWarps = toeplitz_plane_warps(BLOCKS, CHANNELS), kThreads = kWarps * kWarp;
    static constexpr int kParts = CHANNELS / kPart;
    static constexpr bool kStacked = toeplitz_planes_stacked(BLOCKS);
    static constexpr int kPitch = toeplitz_plane_pitch(BLOCKS);  // bytes, as all that follows
    static constexpr int kRow = toeplitz_plane_row(BLOCKS, CHANNELS);
    static constexpr int kGateRow = toeplitz_gate_row(BLOCKS), kGatePart = toeplitz_gate_part(BLOCKS);
    static constexpr int kGatePlane = toeplitz_gate_plane(BLOCKS);
    // Of positions, two columns each: lanes side by side, times kParts, and rows that a block takes at once.
    static constexpr int kAcross = BLOCKS == 1 ? 4 : BLOCKS == 2 ? 8 : BLOCKS <= 4 ? 16 : 32;
    static constexpr int kRowsAtOnce = kThreads / (kAcross * kParts), kTrips = trips(kRowsAtOnce);
    // A warp's rows, and from one to the next: its words of a channel then lie in different banks.
    static constexpr int kWarpRows = kAcross * kParts < kWarp ? kWarp / (kAcross * kParts) : 1;
    static constexpr int kWarpStep = kWarpRows > 1 ? kAcross / 4 : 1;
    // Of gates, where a lane has a position alone.
    static constexpr int kGateRowsAtOnce = kThreads / kAcross, kGateTrips = trips(kGateRowsAtOnce);
};

__device__ __forceinline__ uint32_t& word_at(unsigned char* memory, int at) {
    return *reinterpret_cast<uint32_t*>(memory + at);
}

// threadIdx.x, read anew: what is made of it would else be kept in registers while levels are computed.
__device__ __forceinline__ int thread_index() {
#ifdef __CUDACC__
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
#else
    return threadIdx.x;
#endif
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
template <typename T, int BLOCKS, int CHANNELS>
struct PlanesBlock {
    using Size = Sizes<BLOCKS, CHANNELS>;
    const PlanesParams& p;
    unsigned char* memory;
    int first_group, block_c;  // of the block
    int turn;                  // in the planes: a group, and a part of the block's channels; -1 before the first

    __device__ __forceinline__ PlanesBlock(const PlanesParams& p, unsigned char* memory)
        : p(p),
          memory(memory),
          first_group(blockIdx.x / p.channel_blocks),
          block_c(blockIdx.x % p.channel_blocks * p.tiling.owned()),
          turn(-1) {}
    __device__ __forceinline__ bool is_empty() const { return turn < 0; }
    __device__ __forceinline__ int turn_bits() const { return toeplitz_planes_turn(BLOCKS) ? p.tiling.turn_bits : 0; }
    __device__ __forceinline__ int group(int turn) const {
        return first_group + (turn >> turn_bits()) * p.tiling.programs;
    }
    __device__ __forceinline__ int part(int turn) const { return turn & ((1 << turn_bits()) - 1); }
    __device__ __forceinline__ int first_c(int turn) const { return block_c + part(turn) * CHANNELS; }
    __device__ __forceinline__ int64_t first_image(int turn) const {
        return static_cast<int64_t>(group(turn)) * p.tiling.images;
    }
    __device__ __forceinline__ int images_of(int turn) const {
        return !Size::kStacked ? 1 : group(turn) + 1 < p.groups ? p.tiling.images : p.last_images;
    }
    // Of a row of a group; a product in place of the division by seven.
    __device__ __forceinline__ int image(int row) const {
        return Size::kStacked ? row * 37 >> (8 + p.tiling.image_bits) : 0;
    }
    __device__ __forceinline__ int row_of_image(int row) const { return row - image(row) * p.tiling.span(); }
    __device__ __forceinline__ bool has(int row, int images) const {
        return row_of_image(row) < p.H && image(row) < images;
    }
    // Bytes from the planes' beginning to a row of the group.
    __device__ __forceinline__ int plane_row(int row) const {
        return (p.tiling.halo + row + kToeplitzImageGap * image(row)) * Size::kRow;
    }
    // Elements from a map's first image of a group to the row, or to the one nearest to it that exists.
    __device__ __forceinline__ int map_row(int row, int images, int image_stride, int row_stride) const {
        return min(image(row), images - 1) * image_stride + min(row_of_image(row), p.H - 1) * row_stride;
    }
};

// What a thread reads and writes of ctx and agg: two columns, eight channels, and a row in every trip.
template <typename T, int BLOCKS, int CHANNELS>
struct PlanesThread {
    using Size = Sizes<BLOCKS, CHANNELS>;
    const PlanesBlock<T, BLOCKS, CHANNELS>& b;
    int part, x, first_row;  // part: which eight channels

    __device__ __forceinline__ PlanesThread(const PlanesBlock<T, BLOCKS, CHANNELS>& b) : b(b) {
        constexpr int kWarpRows = Size::kWarpRows, kStep = Size::kWarpStep;
        const unsigned thread = thread_index();
        part = thread % Size::kParts;
        x = 2 * (thread / Size::kParts % Size::kAcross);
        const int slot = thread / (Size::kParts * Size::kAcross), turn = slot / kWarpRows;
        first_row = turn / kStep * kStep * kWarpRows + turn % kStep + slot % kWarpRows * kStep;
    }
    // Of its eight channels and those behind them.
    __device__ __forceinline__ int channels(int turn) const { return b.p.C - b.first_c(turn) - kPart * part; }
    __device__ __forceinline__ bool is_inside() const { return min(b.p.W - x, channels(b.turn)) > 0; }
    __device__ __forceinline__ bool has_both() const { return x + 1 < b.p.W; }
    __device__ __forceinline__ int row(int trip) const { return first_row + trip * Size::kRowsAtOnce; }
    __device__ __forceinline__ int place(int row) const {
        return b.plane_row(row) + toeplitz_plane_channel(BLOCKS, kPart) * part + 2 * kToeplitzPadding + 2 * x;
    }
};

// A thread's share of a group on its way from global to shared memory. Zeros where it has no position.
template <int BLOCKS, int CHANNELS>
struct Fetched {
    using Size = Sizes<BLOCKS, CHANNELS>;
    uint4 left[Size::kTrips], right[Size::kTrips];
    uint2 left_gates[Size::kGateTrips], right_gates[Size::kGateTrips];
};

// Eight channels of a position; zeros beyond the last.
template <typename T, int N>
__device__ __forceinline__ uint4 load_eight(const T* from, int channels) {
    T values[kPart] = {};
#pragma unroll
    for (int c = 0; c < kPart; c += N)
        if (c < channels) {
            T part[N];
            load_raw<N>(from + c, part);
            memcpy(values + c, part, sizeof part);
        }
    uint4 result;
    memcpy(&result, values, sizeof result);
    return result;
}

// One instruction, where nvcc would make four of a uint4 that is stored in an unrolled loop.
__device__ __forceinline__ void store_vector(void* to, const uint4& v) {
#ifdef __CUDACC__
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
#else
    *static_cast<uint4*>(to) = v;
#endif
}

template <typename T, int N>
__device__ __forceinline__ void store_eight(T* to, const uint4& from, int channels) {
    if constexpr (N == kPart) {
        store_vector(to, from);
    } else if constexpr (N == 4) {
        *reinterpret_cast<uint2*>(to) = uint2{from.x, from.y};
        if (channels > 4) *reinterpret_cast<uint2*>(to + 4) = uint2{from.z, from.w};
    } else {
        T values[kPart];
        memcpy(values, &from, sizeof values);
#pragma unroll
        for (int c = 0; c < kPart; ++c)
            if (c < channels) to[c] = values[c];
    }
}

// All loads of ctx at once, where a position's eight channels are aligned to 16 bytes. A thread without a position
// loads another's, so that no branch lies between the loads.
template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void fetch_ctx(const PlanesBlock<T, BLOCKS, CHANNELS>& b, int turn,
                                          Fetched<BLOCKS, CHANNELS>& fetched) {
    const PlanesParams& p = b.p;
    const PlanesThread<T, BLOCKS, CHANNELS> thread(b);
    const int images = b.images_of(turn);
    const T* ctx = static_cast<const T*>(p.ctx) + b.first_image(turn) * p.ctx_b + b.first_c(turn) +
                   (thread.channels(turn) > 0 ? kPart * thread.part : 0) + min(thread.x, p.W - 1) * p.ctx_w;
#pragma unroll
    for (int trip = 0; trip < Sizes<BLOCKS, CHANNELS>::kTrips; ++trip) {
        const T* from = ctx + b.map_row(thread.row(trip), images, p.ctx_image, p.ctx_h);
        fetched.left[trip] = *reinterpret_cast<const uint4*>(from);
        if (thread.has_both()) fetched.right[trip] = *reinterpret_cast<const uint4*>(from + p.ctx_w);
    }
}

// Up to four gates of a position.
template <typename T>
__device__ __forceinline__ uint2 load_gates(const PlanesParams& p, const T* from) {
    T values[4] = {};
#pragma unroll
    for (int l = 0; l < 4; ++l)
        if (l <= p.L) values[l] = from[l];
    uint2 result;
    memcpy(&result, values, sizeof result);
    return result;
}

// Calls f(trip, row, x) for the thread's positions.
template <typename T, int BLOCKS, int CHANNELS, typename F>
__device__ __forceinline__ void for_each_gate_pair(const PlanesBlock<T, BLOCKS, CHANNELS>& b, F f) {
    using Size = Sizes<BLOCKS, CHANNELS>;
    const unsigned thread = thread_index();
    const int x = 2 * (thread % Size::kAcross), images = b.images_of(b.turn);
    if (x >= b.p.W) return;
#pragma unroll
    for (int trip = 0; trip < Size::kGateTrips; ++trip) {
        const int row = thread / Size::kAcross + trip * Size::kGateRowsAtOnce;
        if (b.has(row, images)) f(trip, row, x);
    }
}

template <typename T, int BLOCKS, int CHANNELS, bool FOUR>
__device__ __forceinline__ void fetch_gates(const PlanesBlock<T, BLOCKS, CHANNELS>& b, int turn,
                                            Fetched<BLOCKS, CHANNELS>& fetched) {
    using Size = Sizes<BLOCKS, CHANNELS>;
    const PlanesParams& p = b.p;
    const unsigned thread = thread_index();
    const int images = b.images_of(turn), x = 2 * (thread % Size::kAcross);
    const bool has_both = x + 1 < p.W;
    const T* gates = static_cast<const T*>(p.gates) + b.first_image(turn) * p.gates_b + min(x, p.W - 1) * p.gates_w;
#pragma unroll
    for (int trip = 0; trip < Size::kGateTrips; ++trip) {
        const int row = thread / Size::kAcross + trip * Size::kGateRowsAtOnce;
        const T* from = gates + b.map_row(row, images, p.gates_image, p.gates_h);
        if constexpr (FOUR) {
            fetched.left_gates[trip] = *reinterpret_cast<const uint2*>(from);
            if (has_both) fetched.right_gates[trip] = *reinterpret_cast<const uint2*>(from + p.gates_w);
        } else {
            fetched.left_gates[trip] = load_gates(p, from);
            if (has_both) fetched.right_gates[trip] = load_gates(p, from + p.gates_w);
        }
    }
}

// Brings a group to L2 while the one before it is computed: all blocks fetch at about the same time, and memory would
// rest in between. The gates by the blocks of the first channels, for all.
template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void prefetch_group(const PlanesBlock<T, BLOCKS, CHANNELS>& b, int turn) {
    using Size = Sizes<BLOCKS, CHANNELS>;
    const PlanesParams& p = b.p;
    if (b.group(turn) >= p.groups) return;
    const PlanesThread<T, BLOCKS, CHANNELS> thread(b);
    const int images = b.images_of(turn), x = min(thread.x + thread.part, p.W - 1);
    const T* ctx = static_cast<const T*>(p.ctx) + b.first_image(turn) * p.ctx_b + b.first_c(turn) + x * p.ctx_w;
    const T* gates = static_cast<const T*>(p.gates) + b.first_image(turn) * p.gates_b + x * p.gates_w;
    // One thread of a position takes both columns, two take one each.
    const bool both = Size::kParts == 1 && thread.has_both();
#pragma unroll
    for (int trip = 0; trip < Size::kTrips; ++trip) {
        const T* from = ctx + b.map_row(thread.row(trip), images, p.ctx_image, p.ctx_h);
        prefetch(from);
        if (both) prefetch(from + p.ctx_w);
    }
    if (b.first_c(turn) > 0) return;
#pragma unroll 1
    for (int trip = 0; trip < Size::kTrips; ++trip) {
        const T* from = gates + b.map_row(thread.row(trip), images, p.gates_image, p.gates_h);
        prefetch(from);
        if (both) prefetch(from + p.gates_w);
    }
}

template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void place_pairs(const PlanesThread<T, BLOCKS, CHANNELS>& thread, int row,
                                            const uint4& left, const uint4& right) {
    constexpr int kPitch = Sizes<BLOCKS, CHANNELS>::kPitch;
    const int at = thread.place(row);
    const uint32_t l[] = {left.x, left.y, left.z, left.w}, r[] = {right.x, right.y, right.z, right.w};
#pragma unroll
    for (int c = 0; c < kPart; c += 2) {
        word_at(thread.b.memory, at + c * kPitch) = lows(l[c / 2], r[c / 2]);
        word_at(thread.b.memory, at + (c + 1) * kPitch) = highs(l[c / 2], r[c / 2]);
    }
}

template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void place_ctx(const PlanesBlock<T, BLOCKS, CHANNELS>& b,
                                          const Fetched<BLOCKS, CHANNELS>& fetched) {
    const PlanesThread<T, BLOCKS, CHANNELS> thread(b);
    if (!thread.is_inside()) return;
    const int images = b.images_of(b.turn);
#pragma unroll
    for (int trip = 0; trip < Sizes<BLOCKS, CHANNELS>::kTrips; ++trip)
        if (b.has(thread.row(trip), images))
            place_pairs(thread, thread.row(trip), fetched.left[trip], fetched.right[trip]);
}

// ctx of the group that was taken, where narrower loads are wanted.
template <typename T, int BLOCKS, int CHANNELS, int N>
__device__ __forceinline__ void read_ctx(const PlanesBlock<T, BLOCKS, CHANNELS>& b) {
    const PlanesParams& p = b.p;
    const PlanesThread<T, BLOCKS, CHANNELS> thread(b);
    if (!thread.is_inside()) return;
    const T* ctx =
        static_cast<const T*>(p.ctx) + b.first_image(b.turn) * p.ctx_b + b.first_c(b.turn) + kPart * thread.part;
    const int images = b.images_of(b.turn), channels = thread.channels(b.turn);
#pragma unroll 1
    for (int trip = 0; trip < Sizes<BLOCKS, CHANNELS>::kTrips; ++trip) {
        const int row = thread.row(trip);
        if (!b.has(row, images)) continue;
        const T* from = ctx + (b.map_row(row, images, p.ctx_image, p.ctx_h) + thread.x * p.ctx_w);
        const uint4 left = load_eight<T, N>(from, channels);
        uint4 right{0, 0, 0, 0};
        if (thread.has_both()) right = load_eight<T, N>(from + p.ctx_w, channels);
        place_pairs(thread, row, left, right);
    }
}

// The gates that were fetched. Those beyond the fourth come from global memory.
template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void place_gates(const PlanesBlock<T, BLOCKS, CHANNELS>& b,
                                            const Fetched<BLOCKS, CHANNELS>& fetched) {
    using Size = Sizes<BLOCKS, CHANNELS>;
    const PlanesParams& p = b.p;
    for_each_gate_pair(b, [&](int trip, int row, int x) {
        const int to = p.gates_at + x / 32 * Size::kGatePart + row * Size::kGateRow +
                       x % 8 / 2 * (Size::kGateRow / 4) + x / 8 % 4 * 4;
        const uint2 &l = fetched.left_gates[trip], &r = fetched.right_gates[trip];
        const uint32_t four[] = {lows(l.x, r.x), highs(l.x, r.x), lows(l.y, r.y), highs(l.y, r.y)};
#pragma unroll
        for (int level = 0; level < 4; ++level)
            if (level <= p.L) word_at(b.memory, to + level * Size::kGatePlane) = four[level];
        if (p.L < 4) return;
        const T* from = static_cast<const T*>(p.gates) + b.first_image(b.turn) * p.gates_b +
                        (b.map_row(row, p.tiling.images, p.gates_image, p.gates_h) + x * p.gates_w);
#pragma unroll 1
        for (int level = 4; level <= p.L; ++level) {
            const T pair[] = {from[level], x + 1 < p.W ? from[level + p.gates_w] : from_float<T>(0.0f)};
            memcpy(b.memory + to + level * Size::kGatePlane, pair, sizeof pair);
        }
    });
}

template <typename T, int BLOCKS, int CHANNELS, int N>
__device__ __forceinline__ void write_group(const PlanesBlock<T, BLOCKS, CHANNELS>& b) {
    using Size = Sizes<BLOCKS, CHANNELS>;
    const PlanesParams& p = b.p;
    const PlanesThread<T, BLOCKS, CHANNELS> thread(b);
    if (!thread.is_inside()) return;
    T* const agg = static_cast<T*>(p.agg) + b.first_image(b.turn) * p.H * p.W * p.C + b.first_c(b.turn) +
                   kPart * thread.part + thread.x * p.C;
    const int row_size = p.W * p.C, images = b.images_of(b.turn), channels = thread.channels(b.turn);
    [[maybe_unused]] constexpr int kUnrolled = N == kPart ? Size::kTrips : 1;
#pragma unroll kUnrolled
    for (int trip = 0; trip < Size::kTrips; ++trip) {
        const int row = thread.row(trip);
        if (!b.has(row, images)) continue;
        const int at = thread.place(row);
        uint32_t pairs[kPart];
#pragma unroll
        for (int c = 0; c < kPart; ++c) pairs[c] = word_at(b.memory, at + c * Size::kPitch);
        T* const to = agg + static_cast<int64_t>(b.image(row) * p.H + b.row_of_image(row)) * row_size;
        store_eight<T, N>(to,
                          uint4{lows(pairs[0], pairs[1]), lows(pairs[2], pairs[3]), lows(pairs[4], pairs[5]),
                                lows(pairs[6], pairs[7])},
                          channels);
        if (thread.has_both())
            store_eight<T, N>(to + p.C,
                              uint4{highs(pairs[0], pairs[1]), highs(pairs[2], pairs[3]), highs(pairs[4], pairs[5]),
                                    highs(pairs[6], pairs[7])},
                              channels);
    }
}

// The taps of a channel, for every u = 2 * (lane % 4) + 7 - lane / 4 (toeplitz.cuh), by half a warp.
template <typename T, int BLOCKS, int CHANNELS>
__device__ __forceinline__ void write_plane_taps(const PlanesBlock<T, BLOCKS, CHANNELS>& b, int channel) {
    const PlanesParams& p = b.p;
    const int u = thread_index() % 16, c = b.block_c + channel;
    if (u >= kTapEntries || c >= p.C) return;
#pragma unroll 1
    for (int level = 0; level < p.L; ++level) {
        const PlanesLevel& own = p.level[level];
        const T* const from = static_cast<const T*>(own.weight);
        const int kh = own.kh, kw = own.kw, taps = c * kh * kw;
        // Beyond the kernel's columns another tap is read, and masked.
        const int first = u - 7 - (kToeplitzPadding - kw / 2);
        int column[4];
        uint32_t mask[2] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int x = first + i % 2 + i / 2 * 8;
            const bool inside = static_cast<unsigned>(x) < static_cast<unsigned>(kw);
            column[i] = taps + (inside ? x : 0);
            mask[i / 2] |= inside ? 0xffffu << i % 2 * 16 : 0u;
        }
        unsigned char* to = b.memory + p.taps_at + (channel * p.tiling.tap_rows + own.first_row) * kTapRow + 8 * u;
        // A kernel of one row has a row of zeros above and below it.
        if (own.rows > kh) {
            *reinterpret_cast<uint2*>(to) = *reinterpret_cast<uint2*>(to + 2 * kTapRow) = uint2{0, 0};
            to += kTapRow;
        }
#pragma unroll 4
        for (int ky = 0; ky < kh; ++ky) {
            T four[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) four[i] = from[column[i] + ky * kw];
            uint2 words;
            memcpy(&words, four, sizeof words);
            *reinterpret_cast<uint2*>(to + ky * kTapRow) = uint2{words.x & mask[0], words.y & mask[1]};
        }
    }
}

}  // namespace focalnet::cuda
