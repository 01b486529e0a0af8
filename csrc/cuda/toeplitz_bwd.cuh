// What the two ways of going backward on tensor cores share: whole maps (toeplitz_bwd.cu) and level by level
// (toeplitz_bwd_levels.cu). A block holds planes of block_c channels; `Block` says where they lie and which rows.
//
//     strip   eight rows of one image, the last one cut off by the map's end: a matrix of ldmatrix, or half a tile
//     tile    two strips, one below the other or of two images, and BLOCKS blocks of eight columns
//
// A channel belongs to `sharers` warps that take its tiles in turn, so a warp has a fixed share of a plane.

#pragma once

#include "toeplitz.cuh"

namespace focalnet::cuda {

struct StripRow {
    int image, y;
    bool exists;
};

// The strips of a block's images: `held` rows of each, `slot` rows from one to the next.
struct Strips {
    int held, slot, pitch, each, count;
    unsigned inverse;  // of each, in 1 / 65536

    __device__ __forceinline__ Strips(int images, int held, int slot, int pitch)
        : held(held),
          slot(slot),
          pitch(pitch),
          each((held + 7) / 8),
          count(images * each),
          inverse(images > 1 ? (65536u + each - 1) / each : 0u) {}
    __device__ __forceinline__ int tiles() const { return (count + 1) / 2; }
    __device__ __forceinline__ StripRow row(int strip, int i) const {
        const int image = static_cast<int>(strip * inverse >> 16), y = 8 * (strip - image * each) + i;
        return {image, y, strip < count && y < held};
    }
    // Elements from the first row of the first image.
    __device__ __forceinline__ int offset(const StripRow& r) const { return (r.image * slot + r.y) * pitch; }
    // The same for a row that exists: the strip's last one instead of one beyond it.
    __device__ __forceinline__ int nearest(int strip, int i) const { return at_most(strip, i, held - 1); }
    // The row of zeros below the image instead.
    __device__ __forceinline__ int nearest_or_zero(int strip, int i) const {
        return at_most(strip, strip < count ? i : held, held);
    }

  private:
    __device__ __forceinline__ int at_most(int strip, int i, int last) const {
        StripRow r = row(min(strip, count - 1), i);
        r.y = min(r.y, last);
        return offset(r);
    }
};

// Where a thread is, and which share it has: the channels first, first + step, ... and of each the tiles share,
// share + sharers, ... Divided once.
struct WarpShare {
    int lane, warp, warps, share, first, step;

    __device__ __forceinline__ explicit WarpShare(int sharers)
        : lane(threadIdx.x % kWarp),
          warp(threadIdx.x / kWarp),
          warps(blockDim.x / kWarp),
          share(warp % sharers),
          first(warp / sharers),
          step(warps / sharers) {}
};

// f(c) for the channels of a warp.
template <typename Block, typename F>
__device__ __forceinline__ void for_each_channel(const Block& b, F f) {
    for (int c = b.at.first; c < b.p.tiling.block_c; c += b.at.step) f(c);
}

// The taps of one channel and level, by a warp, two at a time (toeplitz.cuh): a lane has a word of one of the copies.
// A channel beyond C has zeros.
template <typename T>
__device__ __forceinline__ void write_tap_words(T* to, const T* from, int kh, int kw, int steps, bool exists,
                                                int lane) {
    const int width = toeplitz_tap_width(steps), shift = 8 * steps - 4 - kw / 2;
    for (int word = lane; word < width; word += kWarp) {
        const int copy = word >= width / 2, u = 2 * word - copy * (width - 1), tap = u - 7 - shift;
        const bool first = exists && static_cast<unsigned>(tap) < static_cast<unsigned>(kw);
        const bool second = exists && static_cast<unsigned>(tap + 1) < static_cast<unsigned>(kw);
        const T* tap_at = from + tap;
        T* at = to + 2 * word;
#pragma unroll 4
        for (int ky = 0; ky < kh; ++ky) {
            T pair[2] = {};
            if (first) pair[0] = tap_at[0];
            if (second) pair[1] = tap_at[1];
            uint32_t bits;
            memcpy(&bits, pair, sizeof bits);
            *reinterpret_cast<uint32_t*>(at) = bits;
            tap_at += kw;
            at += 2 * width;
        }
    }
}

// Where a lane finds the taps of a level: of its first channel, and from row to row. Under the kernel turned by 180
// degrees the rows come from the last one on, and a lane's two taps are neighbours in the other order, so that it
// reads the same words: element u of a row of zeros, taps, zeros has the tap of element 16 * steps + 6 - u then.
template <int STEPS, bool TURNED, typename T>
struct LaneTaps {
    static constexpr int kWidth = toeplitz_tap_width(STEPS), kRow = (TURNED ? -2 : 2) * kWidth;
    const T* at;

    __device__ __forceinline__ LaneTaps(const T* first, int kh, int lane) {
        const int u = 2 * (lane % 4) + 7 - lane / 4, own = TURNED ? 16 * STEPS + 5 - u : u;
        at = first + (TURNED ? (kh - 1) * 2 * kWidth : 0) + (own % 2 == 0 ? own : kWidth + own - 1);
    }
    // The words of one row, of the two halves of each step.
    __device__ __forceinline__ void load(uint32_t (&b)[STEPS][2], int row) const {
#pragma unroll
        for (int half = 0; half < 2 * STEPS; ++half) {
            const uint32_t word = load_word(at + row * kRow + (TURNED ? -8 : 8) * half);
            b[half / 2][half % 2] = TURNED ? __byte_perm(word, 0, 0x1032) : word;
        }
    }
};

// What a lane has of a tile: rows lane / 4 of both strips, columns column + 8 j, + 1.
template <int BLOCKS>
struct Tile {
    int c, strip, column;
    StripRow row[2];
    float sum[BLOCKS][4];

    __device__ __forceinline__ float2 pair(int half, int j) const { return {sum[j][2 * half], sum[j][2 * half + 1]}; }
    // Columns beyond the map become zero.
    __device__ __forceinline__ void cut_off(int W) {
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j)
#pragma unroll
            for (int k = 0; k < 4; ++k) sum[j][k] = column + 8 * j + k % 2 < W ? sum[j][k] : 0.0f;
    }
};

// The tile'th one of a plane with `groups` of `width` columns side by side.
struct TilePlace {
    int strip, column;

    __device__ __forceinline__ TilePlace(int tile, int groups, int width)
        : strip(2 * (groups == 1 ? tile : tile / groups)), column(groups == 1 ? 0 : tile % groups * width) {}
};

// f(kw's number of steps) as a constant.
template <typename F>
__device__ __forceinline__ void with_steps(int kw, F f) {
    if (toeplitz_steps(kw) == 1)
        f(std::integral_constant<int, 1>{});
    else
        f(std::integral_constant<int, 2>{});
}

// f(number of rows of a kernel) as a constant where the loop over them is unrolled, else 0. Wide tiles fill the
// registers as they are, and what a loop costs is little beside their products.
template <int BLOCKS, typename F>
__device__ __forceinline__ void with_kernel_rows(int kh, F f) {
    if constexpr (BLOCKS <= 2) {
        if (kh == 3) return f(std::integral_constant<int, 3>{});
        if (kh == 5) return f(std::integral_constant<int, 5>{});
        if (kh == 7) return f(std::integral_constant<int, 7>{});
    }
    f(std::integral_constant<int, 0>{});
}

// f(as many of `left` rows of a kernel as dweights takes at once): their sums fit the registers.
template <int BLOCKS, int STEPS, typename F>
__device__ __forceinline__ void with_rows_at_once(int left, F f) {
    if constexpr (STEPS == 1) {
        if constexpr (BLOCKS <= 2)
            if (left >= 7) return f(std::integral_constant<int, 7>{});
        if constexpr (BLOCKS <= 4)
            if (left == 5) return f(std::integral_constant<int, 5>{});
        if (left >= 4) return f(std::integral_constant<int, 4>{});
    }
    if constexpr (STEPS == 1 || BLOCKS <= 2)
        if (left >= 3) return f(std::integral_constant<int, 3>{});
    f(std::integral_constant<int, 1>{});
}

// Tiles that a warp takes at once: loads of taps serve them all, and none waits for its own products alone.
template <int BLOCKS>
constexpr int kTilesAtOnce = BLOCKS <= 2 ? 2 : 1;

// Under one row of the kernel. `rows`: as in convolve_tile (toeplitz.cuh).
template <typename T, int BLOCKS, int STEPS, int TILES>
__device__ __forceinline__ void convolve_row(Tile<BLOCKS> (&tile)[TILES], const SharedAddress (&rows)[TILES],
                                             const uint32_t (&b)[STEPS][2]) {
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        uint32_t a[BLOCKS + 2 * STEPS - 1][2];
        load_fragments<false>(a, rows[n]);
        auto& sum = tile[n].sum;
        // A block alone shares nothing: its fragments are a whole product's, in a row.
        if constexpr (BLOCKS == 1)
#pragma unroll
            for (int s = 0; s < STEPS; ++s)
                mma<T>(sum[0], a[2 * s][0], a[2 * s][1], a[2 * s + 1][0], a[2 * s + 1][1], b[s][0], b[s][1]);
        else
#pragma unroll
            for (int half = 0; half < 2 * STEPS; ++half)
#pragma unroll
                for (int j = 0; j < BLOCKS; ++j)
                    mma_half<T>(sum[j], a[j + half][0], a[j + half][1], b[half / 2][half % 2]);
    }
}

template <int BLOCKS, int STEPS, bool TURNED, typename T, int TILES>
__device__ __forceinline__ void convolve_tiles(Tile<BLOCKS> (&tile)[TILES], SharedAddress (&rows)[TILES],
                                               int row_bytes, LaneTaps<STEPS, TURNED, T> taps, int kh) {
    with_kernel_rows<BLOCKS>(kh, [&](auto known) {
        constexpr int kKnown = decltype(known)::value;
        const int count = kKnown > 0 ? kKnown : kh;
#pragma unroll(kKnown > 0 ? kKnown : 1)
        for (int ky = 0; ky < count; ++ky) {
            uint32_t b[STEPS][2];
            taps.load(b, ky);
            convolve_row<T, BLOCKS, STEPS>(tile, rows, b);
#pragma unroll
            for (int n = 0; n < TILES; ++n) rows[n] += static_cast<SharedAddress>(row_bytes);
        }
    });
}

// The convolution of the planes whose first rows and columns `from` gives, with the taps of a level, `taps` of the
// first channel: f(tile) for the tiles of every channel. What lies beyond the map's columns is zero.
template <int BLOCKS, int STEPS, bool TURNED, typename T, typename Block, typename From, typename F>
__device__ __forceinline__ void convolve(const Block& b, From from, const T* taps, int kh, F f) {
    constexpr int kSize = sizeof(T), kAtOnce = kTilesAtOnce<BLOCKS>;
    const auto& t = b.p.tiling;
    const Strips& strips = b.strips;
    const int tiles = strips.tiles() * t.groups, W = b.p.W, lane = b.at.lane;
    const int lane_offset = 8 * (lane / 16) + 4 - 8 * STEPS - kh / 2 * t.pitch;
    const bool beyond = 8 * BLOCKS * t.groups > W;
    for_each_channel(b, [&](int c) {
        const LaneTaps<STEPS, TURNED, T> own(taps + c * t.tap_rows * t.tap_pitch, kh, lane);
        const SharedAddress source = shared_address(from(c) + lane_offset);
        for (int i = b.at.share; i < tiles; i += kAtOnce * t.sharers) {
            Tile<BLOCKS> tile[kAtOnce];
            SharedAddress rows[kAtOnce];
#pragma unroll
            for (int n = 0; n < kAtOnce; ++n) {
                const TilePlace place(i + n * t.sharers, t.groups, 8 * BLOCKS);
                const int row = strips.nearest(place.strip + lane / 8 % 2, lane % 8) + place.column;
                tile[n] = {c, place.strip, place.column + 2 * (lane % 4), {}, {}};
                rows[n] = source + static_cast<SharedAddress>(row * kSize);
            }
            convolve_tiles<BLOCKS>(tile, rows, t.pitch * kSize, own, kh);
#pragma unroll
            for (int n = 0; n < kAtOnce; ++n) {
                if (n > 0 && i + n * t.sharers >= tiles) break;
                if (beyond) tile[n].cut_off(W);
#pragma unroll
                for (int half = 0; half < 2; ++half) tile[n].row[half] = strips.row(tile[n].strip + half, lane / 4);
                f(tile[n]);
            }
        }
    });
}

// Two positions of N channels, planar, into a channels-last map; `at` points to the first of them.
template <typename T, int N>
__device__ __forceinline__ void write_channels(T* at, int64_t stride, bool both, const float2 (&values)[N]) {
    float left[N], right[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
        left[k] = values[k].x;
        right[k] = values[k].y;
    }
    Vector<T, N>::store(at, left);
    if (both) Vector<T, N>::store(at + stride, right);
}

// A pair of columns of a map of W: what lies beyond is zero.
__device__ __forceinline__ float2 inside_map(float2 value, int x, int W) {
    return {x < W ? value.x : 0.0f, x + 1 < W ? value.y : 0.0f};
}

}  // namespace focalnet::cuda
