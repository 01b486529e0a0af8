// A block of toeplitz_bwd.cu: its share of the problem, where everything lies in shared memory, and the passes that
// read and write maps. Channels last a thread owns two neighbouring columns of N channels, and turns them; planar it
// owns eight columns of a channel.
//
//     planes of T, block_c of each: context, z_1 .. z_L (with halos), dagg
//     the gates, a plane each; the taps of all levels, written out and as they lie in memory
//     agg, or later the sums for dweights (toeplitz_correlate.cuh); the sums over strips

#pragma once

#include "async_copy.cuh"
#include "toeplitz_bwd.cuh"

namespace focalnet::cuda {

struct BackwardLevel {
    const void* weight;
    float* dweights;  // [groups of images][taps][C]; null: not wanted
    int kh, kw;
    int rows_before, taps_before;  // of the levels before, of a channel
    Division by_kw;
};

struct BackwardParams {
    int64_t B;
    int H, W, C, L;
    Map ctx, gates, dagg;
    Map dctx, agg;                         // no data: not wanted
    const void *planar_ctx, *planar_dagg;  // null: channels last
    void *planar_dctx, *planar_agg;        // dctx may take the place of ctx, agg that of dagg
    float* dgates;                         // [splits of channels][B][H * W][L + 1]; null: not wanted
    BackwardLevel level[kMaxLevels];
    int ctx_width, dagg_width, dctx_width, agg_width;
    bool taps_aligned;                       // to 4 bytes
    bool gates_aligned;                      // to 8 bytes, and four of them
    Division by_pairs, by_fours, by_eights;  // of columns
    Division by_rows;                        // of a map
    float scale;
    ToeplitzBackwardTiling tiling;
};

template <typename T>
struct BackwardBlock {
    const BackwardParams& p;
    int group, images, first_c;
    WarpShare at;
    Strips strips;
    Rows rows;
    T *context, *z, *dagg, *gates, *taps, *raw, *agg;  // agg where products are later
    float *products, *strip_sums, *global, *dmean, *dgates;

    __device__ __forceinline__ BackwardBlock(const BackwardParams& p, unsigned char* memory)
        : p(p),
          group(static_cast<int>(blockIdx.x / splits(p))),
          images(static_cast<int>(min(static_cast<int64_t>(p.tiling.images), p.B - first_image()))),
          first_c(split() * p.tiling.block_c * p.tiling.chunks),
          at(p.tiling.sharers),
          strips(images, p.H, p.tiling.rows, p.tiling.pitch),
          rows(images, p.H, p.tiling.rows, p.tiling.pitch) {
        const ToeplitzBackwardTiling& t = p.tiling;
        context = reinterpret_cast<T*>(memory);
        z = context + t.block_c * t.plane();
        dagg = z + p.L * t.block_c * t.plane();
        gates = dagg + t.block_c * sums();
        taps = gates + (p.L + 1) * sums();
        raw = taps + t.block_c * t.tap_rows * t.tap_pitch;
        agg = raw + t.raw();
        products = reinterpret_cast<float*>(agg);
        strip_sums = reinterpret_cast<float*>(agg + max(2 * t.block_c * t.sharers * t.product, t.block_c * sums()));
        global = strip_sums + 2 * t.block_c * t.images * ((p.H + 7) / 8) * t.groups;
        dmean = global + t.block_c * t.images;
        dgates = p.dgates + (split() * p.B + first_image()) * p.H * p.W * (p.L + 1);
    }
    __device__ __forceinline__ int64_t first_image() const { return static_cast<int64_t>(group) * p.tiling.images; }
    __device__ __forceinline__ int split() const { return static_cast<int>(blockIdx.x % splits(p)); }
    static __device__ __forceinline__ unsigned splits(const BackwardParams& p) {
        const int held = p.tiling.block_c * p.tiling.chunks;
        return (p.C + held - 1) / held;
    }
    __device__ __forceinline__ int sums() const { return p.tiling.images * p.H * p.tiling.sum_pitch; }
    __device__ __forceinline__ int count() const { return images * p.H; }  // rows
    // The first row and column of a channel.
    __device__ __forceinline__ T* inside(T* planes, int c) const {
        return planes + c * p.tiling.plane() + p.tiling.halo * p.tiling.pitch + p.tiling.padding;
    }
    __device__ __forceinline__ T* context_of(int c) const { return inside(context, c); }
    __device__ __forceinline__ T* z_of(int level, int c) const {
        return inside(z + level * p.tiling.block_c * p.tiling.plane(), c);
    }
    __device__ __forceinline__ T* gate(int level) const { return gates + level * sums(); }
    __device__ __forceinline__ int sum_at(int row, int x) const { return row * p.tiling.sum_pitch + x; }
    __device__ __forceinline__ int sum_at(const StripRow& r, int x) const { return sum_at(r.image * p.H + r.y, x); }
    // Where a position's dgates lie, of this block's channels.
    __device__ __forceinline__ float* dgates_at(int gate, int row, int x) const {
        const int image = rows.image(row);
        return dgates + ((image * (p.L + 1) + gate) * p.H + row - image * p.H) * p.W + x;
    }
    // The taps of a level, of the first channel: written out, and as they lie.
    __device__ __forceinline__ T* taps_of(int level) const {
        return taps + p.level[level].rows_before * p.tiling.tap_pitch;
    }
    __device__ __forceinline__ T* raw_of(int level) const {
        return raw + p.level[level].taps_before * p.tiling.block_c;
    }
    __device__ __forceinline__ bool wants_dz() const { return p.dctx.data || p.level[0].dweights; }
};

// f(row, x) for every `step`-th of a row's groups of `width` columns, from the `start`-th on.
template <typename T, typename F>
__device__ __forceinline__ void for_each_columns(const BackwardBlock<T>& b, int width, const Division& by_groups,
                                                 int start, int step, F f) {
    const int groups = (b.p.W + width - 1) / width, step_y = by_groups(step), step_x = step - step_y * groups;
    int y = by_groups(start), x = start - y * groups;
#pragma unroll 1
    while (y < b.count()) {
        f(y, width * x);
        y += step_y;
        x += step_x;
        if (x >= groups) {
            x -= groups;
            ++y;
        }
    }
}

template <typename T, typename F>
__device__ __forceinline__ void for_each_pair(const BackwardBlock<T>& b, int start, int step, F f) {
    for_each_columns(b, 2, b.p.by_pairs, start, step, f);
}

template <typename T, typename F>
__device__ __forceinline__ void for_each_four(const BackwardBlock<T>& b, F f) {
    for_each_columns(b, 4, b.p.by_fours, threadIdx.x, blockDim.x, f);
}

// Four neighbouring columns of a plane, in one access of eight bytes.
template <typename T>
struct TwoPairs {
    using Pair = typename PairOf<T>::type;
    Pair pair[2];

    __device__ __forceinline__ TwoPairs() : pair{PairOf<T>::from(0.0f, 0.0f), PairOf<T>::from(0.0f, 0.0f)} {}
    __device__ __forceinline__ explicit TwoPairs(const T* from) {
        const uint2 raw = *reinterpret_cast<const uint2*>(from);
        memcpy(pair, &raw, sizeof raw);
    }
    __device__ __forceinline__ float2 operator[](int k) const { return PairOf<T>::floats(pair[k]); }
    __device__ __forceinline__ void store(T* to) const {
        uint2 raw;
        memcpy(&raw, pair, sizeof raw);
        *reinterpret_cast<uint2*>(to) = raw;
    }
};

// f(row, x, c) for every pair of columns and every N-th channel, those beyond C left out.
template <int N, typename T, typename F>
__device__ __forceinline__ void for_each_vector_of_pairs(const BackwardBlock<T>& b, F f) {
    constexpr int kBits = N == 8 ? 3 : N == 4 ? 2 : 0;
    const int bits = b.p.tiling.channel_bits - kBits, c = (threadIdx.x & ((1 << bits) - 1)) << kBits;
    for_each_pair(b, threadIdx.x >> bits, blockDim.x >> bits, [&](int row, int x) { f(row, x, c); });
}

// The element of a map at a row and column of the block, first_c.
template <typename T>
__device__ __forceinline__ T* place_in(const BackwardBlock<T>& b, const Map& map, int row, int x) {
    const int image = b.rows.image(row), y = row - image * b.p.H;
    T* first = static_cast<T*>(map.data) + b.first_image() * map.stride_b + b.first_c;
    return first + image * map.stride_b + y * map.stride_h + x * map.stride_w;
}

// Two neighbouring columns of N channels, as they lie channels last. They stay words until they are stored: taken
// apart at once, the second map's load would wait for the first's.
template <int N, typename T>
struct TwoColumns {
    using Raw = typename RawOf<N * sizeof(T)>::type;
    Raw left{}, right{};

    // Zeros for channels and columns beyond the map.
    __device__ __forceinline__ TwoColumns(const BackwardBlock<T>& b, const Map& map, int row, int x, int c) {
        const T* from = place_in(b, map, row, x) + c;
        const bool exists = b.first_c + c < b.p.C;
        if (exists) left = *reinterpret_cast<const Raw*>(from);
        if (exists && x + 1 < b.p.W) right = *reinterpret_cast<const Raw*>(from + map.stride_w);
    }
    // N words, one in each plane.
    __device__ __forceinline__ void store_planar(T* to, int plane) const {
        T first[N], second[N];
        memcpy(first, &left, sizeof left);
        memcpy(second, &right, sizeof right);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const T both[] = {first[k], second[k]};
            uint32_t word;
            memcpy(&word, both, sizeof word);
            *reinterpret_cast<uint32_t*>(to + k * plane) = word;
        }
    }
};

// ctx, and dagg if it is wanted, channels last -> planes. The loads of both are in flight at once.
template <bool DAGG, typename T>
__device__ __forceinline__ void load_maps(const BackwardBlock<T>& b) {
    const BackwardParams& p = b.p;
    const int plane = p.tiling.plane(), sums = b.sums();
    with_width<T>(DAGG ? min(p.ctx_width, p.dagg_width) : p.ctx_width, [&](auto n) {
        constexpr int N = decltype(n)::value;
        for_each_vector_of_pairs<N>(b, [&](int row, int x, int c) {
            const TwoColumns<N, T> ctx(b, p.ctx, row, x, c);
            T* context = b.context_of(c) + b.rows.offset(row) + x;
            if constexpr (DAGG) {
                const TwoColumns<N, T> dagg(b, p.dagg, row, x, c);
                ctx.store_planar(context, plane);
                dagg.store_planar(b.dagg + c * sums + b.sum_at(row, x), sums);
            } else {
                ctx.store_planar(context, plane);
            }
        });
    });
}

// The taps of the block's channels, in flight when this returns.
template <typename T>
__device__ __forceinline__ void load_raw_taps(const BackwardBlock<T>& b) {
    const BackwardParams& p = b.p;
    const int channels = min(p.tiling.block_c, p.C - b.first_c);
    for (int l = 0; l < p.L; ++l) {
        const int taps = p.level[l].kh * p.level[l].kw, count = channels * taps;
        const T* from = static_cast<const T*>(p.level[l].weight) + static_cast<int64_t>(b.first_c) * taps;
        T* to = b.raw_of(l);
        if (p.taps_aligned)
            for (int i = 2 * threadIdx.x; i < count; i += 2 * blockDim.x)
                copy_async<4>(to + i, from + i, i + 1 < count ? 4 : 2);
        else
            for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
    }
}

// The taps of every level and channel, written out from those as they lie, shared out to the warps.
template <typename T>
__device__ __forceinline__ void write_all_taps(const BackwardBlock<T>& b) {
    const BackwardParams& p = b.p;
    const ToeplitzBackwardTiling& t = p.tiling;
    for (int i = b.at.warp; i < p.L << t.channel_bits; i += b.at.warps) {
        const int l = i >> t.channel_bits, c = i & (t.block_c - 1), kh = p.level[l].kh, kw = p.level[l].kw;
        write_tap_words(b.taps_of(l) + c * t.tap_rows * t.tap_pitch, b.raw_of(l) + c * kh * kw, kh, kw,
                        toeplitz_steps(kw), b.first_c + c < p.C, b.at.lane);
    }
}

// f(c, row, x, i) for every channel, every eighth column and every row of an image of the block's planar maps; rows
// are counted over all channels. i: of the eights, which follow each other without a gap.
template <typename T, typename F>
__device__ __forceinline__ void for_each_eight(const BackwardBlock<T>& b, F f) {
    const int eights = planar_pitch(b.p.W) / 8, rows = b.p.tiling.block_c * b.p.H, threads = blockDim.x;
    const int step_row = b.p.by_eights(threads), step_x = threads - step_row * eights;
    int row = b.p.by_eights(threadIdx.x), x = threadIdx.x - row * eights;
#pragma unroll 2
    for (int i = threadIdx.x; row < rows; i += threads) {
        f(b.p.by_rows(row), row, 8 * x, i);
        row += step_row;
        x += step_x;
        if (x >= eights) {
            x -= eights;
            ++row;
        }
    }
}

// Elements before the block's first channel of an image, in a planar map.
template <typename T>
__device__ __forceinline__ int64_t before_image(const BackwardBlock<T>& b, int image) {
    return (b.first_c * b.p.B + b.first_image() + image) * b.p.H * planar_pitch(b.p.W);
}

// From a channel's last row of an image to the next channel's first, in a planar map.
template <typename T>
__device__ __forceinline__ int64_t planar_gap(const BackwardBlock<T>& b) {
    return (b.p.B - 1) * b.p.H * planar_pitch(b.p.W);
}

// Planar maps -> planes of shared memory, in flight when this returns (async_copy.cuh); zeros for channels beyond C.
template <bool DAGG, typename T>
__device__ __forceinline__ void copy_planar(const BackwardBlock<T>& b) {
    const ToeplitzBackwardTiling& t = b.p.tiling;
    const int channels = b.p.C - b.first_c;
    // From a channel's last row to the next one's first.
    const int gap = t.plane() - b.p.H * t.pitch, sum_gap = b.sums() - b.p.H * t.sum_pitch;
    const int64_t between = planar_gap(b);
    for (int image = 0; image < b.images; ++image) {
        const T* ctx = static_cast<const T*>(b.p.planar_ctx) + before_image(b, image);
        const T* dagg = static_cast<const T*>(b.p.planar_dagg) + before_image(b, image);
        T *context = b.context_of(0) + image * t.rows * t.pitch, *sum = b.dagg + image * b.p.H * t.sum_pitch;
        for_each_eight(b, [&](int c, int row, int x, int i) {
            T* to = context + c * gap + row * t.pitch + x;
            T* to_dagg = sum + c * sum_gap + row * t.sum_pitch + x;
            if (c < channels) {
                const int64_t from = c * between + 8 * i;
                copy_async<8>(to, ctx + from);
                copy_async<8>(to + 4, ctx + from + 4);
                if constexpr (DAGG) copy_async<16>(to_dagg, dagg + from);
            } else {
                reinterpret_cast<uint2*>(to)[0] = reinterpret_cast<uint2*>(to)[1] = uint2{0, 0};
                if constexpr (DAGG) *reinterpret_cast<uint4*>(to_dagg) = uint4{0, 0, 0, 0};
            }
        });
    }
}

// The planes of the block's next channels: they come from memory while it computes.
template <typename T>
__device__ __forceinline__ void prefetch_planar(const BackwardBlock<T>& b) {
    constexpr int kStep = 32 / sizeof(T);
    const int next = b.first_c + b.p.tiling.block_c, channels = min(b.p.tiling.block_c, b.p.C - next);
    const int plane = b.p.H * planar_pitch(b.p.W);
    for (int c = 0; c < channels; ++c) {
        const int64_t first = ((next + c) * b.p.B + b.first_image()) * plane;
        for (int i = kStep * threadIdx.x; i < b.images * plane; i += kStep * blockDim.x) {
            prefetch(static_cast<const T*>(b.p.planar_ctx) + first + i);
            prefetch(static_cast<const T*>(b.p.planar_dagg) + first + i);
        }
    }
}

// Planes of sums -> a planar map.
template <typename T>
__device__ __forceinline__ void store_planar(const BackwardBlock<T>& b, const T* planes, void* map) {
    const int sum_pitch = b.p.tiling.sum_pitch, channels = b.p.C - b.first_c, gap = b.sums() - b.p.H * sum_pitch;
    const int64_t between = planar_gap(b);
    for (int image = 0; image < b.images; ++image) {
        T* to = static_cast<T*>(map) + before_image(b, image);
        const T* from = planes + image * b.p.H * sum_pitch;
        for_each_eight(b, [&](int c, int row, int x, int i) {
            if (c >= channels) return;
            *reinterpret_cast<uint4*>(to + c * between + 8 * i) =
                *reinterpret_cast<const uint4*>(from + c * gap + row * sum_pitch + x);
        });
    }
}

// Planar -> channels last, from planes of sums.
template <typename T>
__device__ __forceinline__ void store(const BackwardBlock<T>& b, const T* planes, const Map& map, int width) {
    with_width<T>(width, [&](auto n) {
        constexpr int N = decltype(n)::value;
        const int plane = b.sums();
        for_each_vector_of_pairs<N>(b, [&](int row, int x, int c) {
            if (b.first_c + c >= b.p.C) return;
            const T* from = planes + c * plane + b.sum_at(row, x);
            T left[N], right[N];
#pragma unroll
            for (int k = 0; k < N; ++k) {
                T both[2];
                load_raw<2>(from + k * plane, both);
                left[k] = both[0];
                right[k] = both[1];
            }
            T* to = place_in(b, map, row, x) + c;
            store_raw<N>(to, left);
            if (x + 1 < b.p.W) store_raw<N>(to + map.stride_w, right);
        });
    });
}

template <typename T>
__device__ __forceinline__ void load_gates(const BackwardBlock<T>& b) {
    const BackwardParams& p = b.p;
    for_each_pair(b, threadIdx.x, blockDim.x, [&](int row, int x) {
        for (int k = 0; k < 2 && x + k < p.W; ++k) {
            const T* gate = place_in(b, p.gates, row, x + k) - b.first_c;
            T* to = b.gates + b.sum_at(row, x + k);
            if (p.gates_aligned) {
                T all[4];
                load_raw<4>(gate, all);
#pragma unroll
                for (int l = 0; l < 4; ++l) to[l * b.sums()] = all[l];
            } else {
                for (int l = 0; l <= p.L; ++l) to[l * b.sums()] = gate[l];
            }
        }
    });
}

}  // namespace focalnet::cuda
