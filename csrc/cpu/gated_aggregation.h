// What the operators, the driver and the kernels of gated aggregation agree on. Plain data only: this header is also
// read by translation units compiled for a higher instruction set. An inline function here would be compiled once for
// each of them and merged by the linker, and the copy it keeps could be one this processor cannot run.

#pragma once

#include <cstdint>

namespace focalnet::cpu {

// Channels of a task. 16 float32 channels are one cache line. The sums over channels (dgates) are formed block by
// block, so the block must not depend on the number of threads.
constexpr int64_t kBlock = 16;

// What a map or a matrix consists of. kRounded is float32 in memory that takes only what bfloat16 holds: for products
// in float32 of what others compute in bfloat16.
enum class Element : int { kFloat32, kBFloat16, kRounded };

// Who works beside the calling thread, see threads.h.
enum class Threads : int { kTorch, kOwn };

// A channels-last map (B, H, W, channels) with channel stride 1; strides count elements.
struct Map {
    void* data;
    int64_t stride_b, stride_h, stride_w;
};

// Depthwise weights (C, 1, kh, kw), contiguous. `data` is not read where packed weights are given.
struct FocalWeight {
    const void* data;
    int64_t kh, kw;
};

struct Problem {
    Element element;
    int64_t B, H, W, C, L;
    Map ctx;
    Map gates;
    const FocalWeight* weights;             // L of them
    float scale;                            // 1 / (L + 1) if the modulator is normalised, else 1
    const float* packed_weights = nullptr;  // what pack_focal_weights wrote; where null, every forward packs anew
    Threads threads = Threads::kTorch;
};

struct Gradients {
    bool want_ctx, want_gates, want_weights;
    Map dctx, dgates;       // contiguous, of the inputs' element type
    void* const* dweights;  // L of them, contiguous (C, 1, kh, kw), of the inputs' element type
};

// The map that level l reads, or its gradients: rows of vectors between two margins of zeros.
struct LevelLayout {
    int64_t kh, kw;
    int64_t tap;       // taps of the levels before this one
    int64_t halo;      // rows of it that a band of rows needs beyond its own, on each side
    int64_t pitch;     // floats from row to row
    int64_t capacity;  // rows held
    int64_t offset;    // floats from the start of a vector's scratch
};

// Forward: (image, block of channels, band of rows). See gated_aggregation_fwd.inc.
struct ForwardPlan {
    int64_t bands, band_rows;
    int64_t step;  // rows that enter the chain at a time
    int64_t taps;  // of all levels together
    int64_t agg_capacity, agg_offset;
    int64_t vector_floats;  // scratch of one vector of channels
    int64_t row_offset;     // one row of convolution results, shared by the vectors
    int64_t stage_offset;   // if own_stage: [H][W][kBlock]
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
    float* row_sums;  // [B][blocks][H][kBlock], of the last level
    float* stage;     // bfloat16 and several bands: [B][blocks][H][W][kBlock], else null
    float* scratch;
    const float** rows;  // room for the largest kh
    int64_t* done;       // room for 2 (L + 1)
    int64_t b, block, band;
};

// Backward: (image, block of channels). See gated_aggregation_bwd.inc.
struct BackwardPlan {
    int64_t steps, step;     // rows that enter the chain at a time
    int64_t bands, columns;  // of the map, in bands of columns
    int64_t margin;          // columns of zeros on each side of a row
    int64_t taps;
    const LevelLayout *levels, *grads;  // L each: the inputs of the levels; GELU'(z), later dz
    LevelLayout dagg;
    const int64_t *lags,
        *halos;  // 2 L + 1 each: rows that a place lags, columns of it that a band needs beyond its own
    int64_t row_offset, last_offset, zeros_offset, totals_offset, sums_offset, scratch_floats;
};

struct BackwardTask {
    const Problem* problem;
    const BackwardPlan* plan;
    const Gradients* out;
    Map dagg;
    const float* sums;     // [B][C], of the last level over the map; null: not known
    const float* weights;  // as in ForwardTask
    const float* flipped;  // the same, both axes reversed and not halved
    const float* gates;    // [B][L + 1][H][W]
    float* dgates;         // [B][blocks][L + 1][H][W]
    float* dweights;       // [B][C / lanes][taps][lanes]
    float* scratch;
    const float** rows;  // room for 2 (rows of a step + largest kh)
    int64_t b, block;
};

// Of the fused block: see block.h.
struct Linear;
struct GemmTask;
struct RowsTask;

// Of an MLP's hidden units: see gelu_rows.h.
struct GeluTask;

// What a translation unit compiled for one instruction set offers.
struct Kernels {
    int64_t lanes;
    void (*forward)(const ForwardTask&);
    void (*forward_global)(const ForwardTask&);
    void (*backward)(const BackwardTask&);
    void (*pack)(const Linear&, int64_t column, float* panel);
    void (*gemm)(const GemmTask&);
    void (*normalize_and_add)(const RowsTask&);
    void (*bias_gelu)(const GeluTask&);
    void (*gelu_backward)(const GeluTask&);
};

extern const Kernels kPlainKernels, kAvx2Kernels, kAvx512Kernels;

// ForwardTask's weights, and how many floats they are.
int64_t packed_focal_floats(const Problem& problem);
void pack_focal_weights(const Problem& problem, float* packed);
// `sums`, if given, receives the sums of the last level over the map, [B][C]. Backward needs them before it can begin;
// without them it forms them itself.
void gated_aggregation(const Problem& problem, const Map& agg, float* sums = nullptr);
void gated_aggregation_backward(const Problem& problem, const Map& dagg, const float* sums, const Gradients& out);

}  // namespace focalnet::cpu
