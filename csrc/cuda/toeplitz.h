// What the plans (toeplitz_plan.cpp, toeplitz_bwd_plan.cpp) and the launchers of the kernels on tensor cores agree on.
// A depthwise convolution is a product with banded Toeplitz matrices: with the taps of kernel row ky in T, T[i][j] =
// w[ky][i - j], eight columns of a row of outputs are sixteen (or 32) columns of a row of inputs times T, summed over
// ky. Sixteen rows at once are one product m16n8k16, or its two halves m16n8k8.
//
// 16-bit types only: their products are exact in float32, so that nothing changes but the order of sums.

#pragma once

#include "gated_aggregation.h"

namespace focalnet::cuda {

// What the kernels take; focalnet/backends/cuda.py says so in words (why_not_tensor_cores).
constexpr int kMaxToeplitzKernel = 15;
constexpr int kMaxToeplitzReach = 24;  // the sum of the levels' k / 2: with it the smallest tile fits every device

constexpr int kToeplitzPadding = 4;    // columns before a plane, where one step of 16 columns does: k <= 9
constexpr int kToeplitzPadding2 = 12;  // and where it takes two

// How forward cuts the maps. A block owns `images` whole images, or one tile of one image, and block_c channels.
struct ToeplitzTiling {
    int images;
    int block_c;
    int warps;   // of a channel: side by side, each takes `blocks` blocks of eight columns
    int blocks;  // 1, 2, 4 or 7
    int groups;  // channels at a time; divides block_c
    int tile_h, tile_w, tiles_y, tiles_x;
    int padding;      // columns before the first of a plane
    int rows, pitch;  // of an image's plane in shared memory, with halos
    int sum_rows;     // of all images: the tile's
    int sum_pitch;
    int tap_rows, tap_pitch;  // of the levels' taps, written out for one channel and the largest level
    size_t shared_bytes;
    double cost;  // 0: nothing fits

    __host__ __device__ int threads() const { return groups * warps * 32; }
    __host__ __device__ int tiles() const { return tiles_y * tiles_x; }
    __host__ __device__ bool whole_map() const { return tiles_y * tiles_x == 1; }
    __host__ __device__ int plane() const { return images * rows * pitch; }  // elements of a channel
    __host__ __device__ int sums() const { return sum_rows * sum_pitch; }
};

// How forward takes small maps (toeplitz_fwd_planes.cu): a block computes `channels` channels at a time, and of the
// groups of `images` images every one in `programs`.
struct ToeplitzPlanesTiling {
    int channels;   // 8, or 16: positions of the maps are then read and written in whole sectors of 32 bytes
    int turn_bits;  // it owns 1 << turn_bits times as many, and takes them in turn: gates are read once for all
    int images;
    int image_bits;  // an image has 7 << image_bits of a group's 56 rows
    int blocks;      // of eight columns
    int programs;
    int halo, rows;  // above and below every image; of a plane
    int tap_rows;    // of all levels
    size_t shared_bytes;
    double cost;  // 0: it does not take the maps

    __host__ __device__ int span() const { return 7 << image_bits; }
    __host__ __device__ int owned() const { return channels << turn_bits; }
};

// A lane has every seventh row of a group, and all rows of a lane belong to one image.
constexpr int kToeplitzPlaneSets = 7, kToeplitzPlaneRows = 8 * kToeplitzPlaneSets, kToeplitzPlaneColumns = 56;
constexpr int kToeplitzImageGap = 8;  // rows of zeros between images: the halo of both
// Rows of taps that a level has: three at least.
constexpr __host__ __device__ int toeplitz_plane_tap_rows(int kh) { return kh < 3 ? 3 : kh; }
// Several images in a group.
constexpr __host__ __device__ bool toeplitz_planes_stacked(int blocks) { return blocks <= 4; }
// Warps of a block: each takes one channel, or several in turn.
constexpr __host__ __device__ int toeplitz_plane_warps(int blocks, int channels) { return blocks > 2 ? 8 : channels; }
// Blocks of threads of which one has all registers of a multiprocessor may take several blocks of channels in turn.
constexpr __host__ __device__ bool toeplitz_planes_turn(int blocks) { return blocks > 2; }
// Of blocks of threads on a multiprocessor, by their registers.
constexpr __host__ __device__ int toeplitz_planes_resident(int blocks, int channels) {
    if (blocks > 2) return 1;
    return (blocks == 1 ? 24 : 16) / channels;
}
// Bytes of a row of one channel: four columns before the map, and four behind.
constexpr __host__ __device__ int toeplitz_plane_pitch(int blocks) { return (blocks + 1) * 16; }
// Bytes from the first channel of a row to another. Eight channels lie a multiple of 128 bytes apart; the gap puts
// those of the upper half, which neighbouring lanes write, into the other half of the banks.
constexpr __host__ __device__ int toeplitz_plane_channel(int blocks, int channel) {
    return channel * toeplitz_plane_pitch(blocks) + channel / 8 * 64;
}
// Bytes of a row of all channels, an odd number of 16 bytes.
constexpr __host__ __device__ int toeplitz_plane_row(int blocks, int channels) {
    return toeplitz_plane_channel(blocks, channels - 1) + toeplitz_plane_pitch(blocks) + 16;
}
// Gates of a row that lie together: of up to four blocks, a power of two. Bytes of such a row, of all rows (the second
// four blocks lie in the other half of the banks), and of a level.
constexpr __host__ __device__ int toeplitz_gate_row(int blocks) { return 16 * (blocks > 2 ? 4 : blocks); }
constexpr __host__ __device__ int toeplitz_gate_part(int blocks) {
    return kToeplitzPlaneRows * toeplitz_gate_row(blocks) + (blocks > 4 ? 64 : 0);
}
constexpr __host__ __device__ int toeplitz_gate_plane(int blocks) {
    return (blocks > 4 ? 2 : 1) * toeplitz_gate_part(blocks);
}

// n / by without a division, exact for n * by < 2^20 and n < 2^12: kernels that divide once a pass have many passes.
struct Division {
    unsigned inverse;

    Division() = default;
    explicit Division(int by) : inverse(((1u << 20) + by - 1) / by) {}
    __host__ __device__ int operator()(int n) const { return static_cast<int>(n * inverse >> 20); }
};

// How backward cuts the maps: whole images. A block goes over `chunks` blocks of channels of the same images.
struct ToeplitzBackwardTiling {
    int images;
    int block_c, channel_bits, chunks;  // block_c is 1 << channel_bits
    int warps, sharers;                 // sharers: of a channel; divides warps
    int blocks;                         // of eight columns, in a warp's tile: 1, 2, 4 or 7
    int groups;                         // of them side by side
    int padding, halo;                  // columns before; rows above, between and below the images' planes
    int rows, pitch;                    // rows from one image's plane to the next
    int sum_pitch;                      // of dagg and the gates, without halo
    int product;                        // floats of a warp's sums for dweights
    int tap_rows, tap_pitch;            // of a channel's taps written out, of all levels
    int all_taps;                       // of a channel, of all levels
    bool planar;                        // ctx and dagg are read planar, dctx and agg written so (toeplitz_turn.cu)
    size_t shared_bytes;
    double cost;  // 0: nothing fits

    __host__ __device__ int threads() const { return warps * 32; }
    __host__ __device__ int plane() const { return (halo + images * rows) * pitch; }
    __host__ __device__ int raw() const { return (block_c * all_taps + 7) / 8 * 8; }  // taps as they lie
};

// How backward takes one level in bands of an image's rows, a multiple of sixteen or all.
struct ToeplitzBandTiling {
    int block_c, channel_bits;
    int warps, sharers, blocks, groups;  // as above
    int padding, halo;
    int band, bands;  // rows of the map
    int rows, pitch;
    int sum_pitch, product;
    int tap_rows, tap_pitch;
    size_t shared_bytes;
    double cost;  // 0: nothing fits

    __host__ __device__ int plane() const { return rows * pitch; }
};

// All levels; the first launch takes bands of kToeplitzFirstBand rows.
struct ToeplitzBandsPlan {
    int block_c;
    size_t first_bytes;  // of shared memory, of the first launch
    ToeplitzBandTiling level[kMaxLevels];
    double cost;  // 0: nothing fits
};

constexpr int kToeplitzFirstBand = 16;
constexpr int kToeplitzBackwardThreads = 256;     // of a block that takes bands
constexpr int kMaxToeplitzBackwardThreads = 512;  // of a block that takes whole maps

constexpr __host__ __device__ int toeplitz_steps(int kw) { return kw <= 2 * kToeplitzPadding + 1 ? 1 : 2; }
// Of a row of taps, twice 16 * steps + 8 elements.
constexpr __host__ __device__ int toeplitz_tap_width(int steps) { return 16 * steps + 8; }

ToeplitzTiling plan_toeplitz(const Problem& p);
ToeplitzPlanesTiling plan_toeplitz_planes(const Problem& p);
// Forward takes the maps as planes; false: as plan_toeplitz says.
bool planes_forward(const Problem& p);
ToeplitzBackwardTiling plan_toeplitz_backward(const Problem& p);
ToeplitzBandsPlan plan_toeplitz_bands(const Problem& p);
// Whole maps are the cheaper way, or the only one; false: bands, if they fit.
bool whole_maps_backward(const Problem& p);

// A planar map is [B][C][H][planar_pitch(W)]: rows are 16 bytes wide, and what lies beyond W is zero.
constexpr __host__ __device__ int planar_pitch(int W) { return (W + 7) / 8 * 8; }

// Those of backward on whole maps have their first two axes exchanged: [C][B][H][planar_pitch(W)]. Where W fills the
// pitch that is a matrix (C, B * H * W), which products outside write and read at no cost. True if backward works on
// such maps: dagg may then be given so, and agg comes so (Gradients::planar_maps).
bool takes_planar_maps(const Problem& p);

template <typename T>
Status toeplitz_planes(const Problem& p, const Map& agg, cudaStream_t stream);
size_t toeplitz_forward_scratch_bytes(const Problem& p);
Status toeplitz_forward(const Problem& p, const Map& agg, void* scratch, cudaStream_t stream);

// What forward's convolutions give, in planar maps z; the gates, planar too, [B][L + 1][H][planar_pitch(W)], with
// nothing written beyond W; the sums of the last level over each tile, [B][tiles][C]; agg, still without the global
// term, if it has data.
int toeplitz_forward_tiles(const Problem& p);
template <typename T>
Status toeplitz_levels(const Problem& p, const Map& agg, T* const* z, T* planar_gates, float* sums,
                       cudaStream_t stream);

// Of what one of the two plans takes.
size_t toeplitz_backward_scratch_bytes(const Problem& p, const Gradients& out);
Status toeplitz_backward(const Problem& p, const Map& dagg, const Gradients& out, void* scratch, cudaStream_t stream);

}  // namespace focalnet::cuda
