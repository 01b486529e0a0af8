// The interface between the operators, the driver and the kernels of gated aggregation. Plain data only: translation
// units compiled for a higher instruction set include this header too. An inline function here would be compiled once
// for each of them. The linker keeps one copy, which might be one that the processor cannot run.

#pragma once

#include <cstdint>

namespace focalnet::cpu {

// Channels of a task. 16 float32 channels are one cache line. dgates are summed over channels block by block, so the
// size of a block must not depend on the number of threads.
constexpr int64_t kBlock = 16;

// Element type of a map or a matrix. kRounded is float32 in memory, with values rounded to bfloat16. It serves to
// compute products of bfloat16 in float32 on processors without bfloat16 dot products.
enum class Element : int { kFloat32, kBFloat16, kRounded };

// The threads that share the work of a call, see threads.h.
enum class Threads : int { kTorch, kOwn };

// A channels-last map (B, H, W, channels) with channel stride 1; strides count elements.
struct Map {
    void* data;
    int64_t stride_b, stride_h, stride_w;
};

// Depthwise weights (C, 1, kh, kw), contiguous. `data` is not read if packed weights are given.
struct FocalWeight {
    const void* data;
    int64_t kh, kw;
};

struct Problem {
    Element element;
    int64_t B, H, W, C, L;
    Map ctx;
    Map gates;
    const FocalWeight* weights;             // [L]
    float scale;                            // 1 / (L + 1) if the modulator is normalised, else 1
    const float* packed_weights = nullptr;  // from pack_focal_weights; if null, every forward packs them
    Threads threads = Threads::kTorch;
};

struct Gradients {
    bool want_ctx, want_gates, want_weights;
    Map dctx, dgates;       // contiguous, in the inputs' element type
    void* const* dweights;  // [L], each contiguous (C, 1, kh, kw), in the inputs' element type
};

// Layout of the map that a level reads, or of its gradients, in scratch: rows of vectors between two margins of zeros.
struct LevelLayout {
    int64_t kh, kw;
    int64_t tap;       // taps of all earlier levels
    int64_t halo;      // rows needed beyond a band of rows, on each side
    int64_t pitch;     // floats from one row to the next
    int64_t capacity;  // rows that the ring holds
    int64_t offset;    // floats from the start of a vector's scratch
};

// A forward task is one image, block of channels and band of rows. See gated_aggregation_fwd.inc.
struct ForwardPlan {
    int64_t bands, band_rows;
    int64_t step;  // rows that enter the chain at a time
    int64_t taps;  // total of all levels
    int64_t agg_capacity, agg_offset;
    int64_t vector_floats;  // scratch of one vector of channels
    int64_t row_offset;     // one row of convolution results, shared by the vectors
    int64_t stage_offset;   // of the stage, [H][W][kBlock], if own_stage
    bool own_stage;         // the local part of agg waits in scratch, not in agg itself
    int64_t scratch_floats;
    const LevelLayout* levels;
};

struct ForwardTask {
    const Problem* problem;
    const ForwardPlan* plan;
    const float* weights;  // [C / lanes][taps][lanes], halved, zero beyond C
    const float* gates;    // [B][L + 1][H][W]
    Map agg;
    float* row_sums;  // [B][blocks][H][kBlock], the sum of each row of the last level
    float* stage;     // [B][blocks][H][W][kBlock] for bfloat16 and several bands, otherwise null
    float* scratch;
    const float** rows;  // [largest kh], scratch
    int64_t* done;       // [2 (L + 1)], scratch
    int64_t b, block, band;
};

// A backward task is one image and block of channels. See gated_aggregation_bwd.inc.
struct BackwardPlan {
    int64_t steps, step;     // number of steps, and rows that enter the chain in each
    int64_t bands, columns;  // number of bands of columns, and columns in each
    int64_t margin;          // columns of zeros on each side of a row
    int64_t taps;
    const LevelLayout *levels, *grads;  // [L]: inputs of the levels; GELU'(z), later dz
    LevelLayout dagg;
    // [2 L + 1], one per place: rows by which the place lags, and columns that it needs beyond a band on each side.
    const int64_t *lags, *halos;
    int64_t row_offset, last_offset, zeros_offset, totals_offset, sums_offset, scratch_floats;
};

struct BackwardTask {
    const Problem* problem;
    const BackwardPlan* plan;
    const Gradients* out;
    Map dagg;
    const float* sums;     // [B][C], sums of the last level over the map, or null
    const float* weights;  // as in ForwardTask
    const float* flipped;  // the same, with both kernel axes reversed, not halved
    const float* gates;    // [B][L + 1][H][W]
    float* dgates;         // [B][blocks][L + 1][H][W]
    float* dweights;       // [B][C / lanes][taps][lanes]
    float* scratch;
    const float** rows;  // [2 (rows of a step + largest kh)], scratch
    int64_t b, block;
};

// Defined in block.h.
struct Linear;
struct GemmTask;
struct RowsTask;
struct WeightGradientTask;

// Defined in gelu_rows.h.
struct GeluTask;

// The kernels of one instruction set, from the translation unit compiled for it.
struct Kernels {
    int64_t lanes;
    void (*forward)(const ForwardTask&);
    void (*forward_global)(const ForwardTask&);
    void (*backward)(const BackwardTask&);
    void (*pack)(const Linear&, int64_t column, float* panel);
    void (*gemm)(const GemmTask&);
    void (*normalize_and_add)(const RowsTask&);
    void (*gelu)(const GeluTask&);
    void (*gelu_backward)(const GeluTask&);
    void (*weight_gradient)(const WeightGradientTask&);
};

extern const Kernels kPlainKernels, kAvx2Kernels, kAvx512Kernels;

// Packs ForwardTask's weights into `packed`, which has room for packed_focal_floats(problem) floats.
int64_t packed_focal_floats(const Problem& problem);
void pack_focal_weights(const Problem& problem, float* packed);
// `sums`, if not null, receives the sums of the last level over the map, [B][C]. Backward needs them before it can
// start, and computes them itself if they are null.
void gated_aggregation(const Problem& problem, const Map& agg, float* sums = nullptr);
void gated_aggregation_backward(const Problem& problem, const Map& dagg, const float* sums, const Gradients& out);

}  // namespace focalnet::cpu
