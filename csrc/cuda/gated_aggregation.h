// What the operators (gated_aggregation_ops.cpp), the planner (plan.cpp) and the launchers (gated_aggregation_fwd.cu,
// gated_aggregation_bwd.cu) agree on. Plain data: nothing here knows torch, so the kernels also compile, and are
// tested, where there is neither torch nor a GPU.

#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace focalnet::cuda {

constexpr int kMaxLevels = 8;
constexpr int kMaxKernel = 31;  // height and width of a focal level: with these the smallest tile fits every device

// Of the kernels, known to the planner: a thread computes kRunY x kRunX outputs and takes up to kMaxColumns columns of
// a focal kernel at once; a block of backward has kThreads threads.
constexpr int kRunX = 7, kRunY = 2;
constexpr int kMaxColumns = 7;
constexpr int kThreads = 256;

enum class Element : int { kFloat32, kBFloat16, kFloat16 };

inline int size_of(Element e) { return e == Element::kFloat32 ? 4 : 2; }

// A channels-last map (B, H, W, channels) with channel stride 1; strides count elements.
struct Map {
    void* data;
    int64_t stride_b, stride_h, stride_w;
};

// A depthwise kernel (C, 1, kh, kw), contiguous.
struct FocalWeight {
    const void* data;
    int kh, kw;
};

// What a device offers a block, in bytes, and how many blocks run at once.
struct Limits {
    int shared_per_block, shared_per_multiprocessor, multiprocessors;
};

struct Problem {
    Element element;
    int64_t B;
    int H, W, C, L;
    Map ctx, gates;
    FocalWeight weights[kMaxLevels];
    float scale;        // 1 / (L + 1) if the modulator is normalised, else 1
    bool tensor_cores;  // 16-bit elements, and kernels that toeplitz.h takes
    Limits limits;
};

struct Gradients {
    bool want_ctx, want_gates, want_weights;
    Map dctx, dgates;            // of the inputs' element type; the rows of dgates at one pitch, stride_w
    void* dweights[kMaxLevels];  // contiguous (C, 1, kh, kw), of the inputs' element type
    Map agg;                     // forward's result once more, contiguous; no data: not wanted
    bool planar_maps;            // dagg lies as takes_planar_maps (toeplitz.h) says, and agg will
};

// Blocks of `size` that n things take, the last one not full.
constexpr int blocks_for(int64_t n, int64_t size) { return static_cast<int>((n + size - 1) / size); }
constexpr int round_up(int n, int to) { return blocks_for(n, to) * to; }

// How a launch cuts the maps: a block owns one tile of one image and block_c channels of it.
struct Tiling {
    int block_c;         // channels, a power of two
    int tile_h, tile_w;  // of the output
    int tiles_y, tiles_x;
    int rows;   // of the largest region a plane in shared memory holds: the tile and its halo, inside the map
    int pitch;  // elements from row to row of a plane
    int threads;
    size_t shared_bytes;
    double cost;  // of the launch, in bytes moved; 0: nothing fits
};

// Levels first .. last - 1 in one launch.
struct Group {
    int first, last;
    Tiling tiling;
};

// Forward in one launch (all levels from shared memory) or in several; whole_map: the blocks own whole planes, so that
// the global level needs no second pass.
struct ForwardPlan {
    int groups;
    Group group[kMaxLevels];
    bool whole_map;
};

ForwardPlan plan_forward(const Problem& p);
bool fits(const ForwardPlan& plan);  // on the device whose limits it was made for
// Backward in one launch, from whole planes: two for each level and one more.
Tiling plan_backward_map(const Problem& p);
// The levels of backward one by one: cut so that the planes of level l's input and of its gradient fit.
Tiling plan_backward_level(const Problem& p, int level);

// A launch that failed: the kernel's name and the driver's answer. No exception crosses a kernel's file.
struct Status {
    cudaError_t error = cudaSuccess;
    const char* kernel = "";
    explicit operator bool() const { return error != cudaSuccess; }
};

size_t forward_scratch_bytes(const Problem& p);
Status gated_aggregation(const Problem& p, const Map& agg, void* scratch, cudaStream_t stream);

size_t backward_scratch_bytes(const Problem& p, const Gradients& out);
Status gated_aggregation_backward(const Problem& p, const Map& dagg, const Gradients& out, void* scratch,
                                  cudaStream_t stream);

}  // namespace focalnet::cuda
