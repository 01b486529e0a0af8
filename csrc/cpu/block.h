// What the driver of the fused block and its kernels agree on. Plain data only, as in gated_aggregation.h.

#pragma once

#include <cstdint>

namespace focalnet::cpu {

// Columns of a panel of packed weights: one cache line of float32, whatever the instruction set.
constexpr int64_t kPanel = 16;

constexpr int64_t kDepth = 256;  // k of a panel's slice at most: 16 KB of L1, beside the rows of a tile

// A linear layer, K -> N: weights and bias as a module has them.
struct Linear {
    const float* weight;  // (N, K)
    const float* bias;    // (N), or null
    const float* scale;   // (N), of weights and bias, or null
    int64_t K, N;
    // A copy in scratch, [panels][1 + K][kPanel], the bias first, zero beyond the last column; the three above are not
    // read then. Null: every product packs slice by slice what it reads.
    const float* packed = nullptr;
};

// What happens to a tile of the product while it is in L1.
enum class After : int { kNothing, kGelu, kMultiply };

// c[:, columns] (+)= a[:, k_begin:k_end] @ W[columns, k_begin:k_end]^T, with W's bias at k = 0 and `after` at k = K.
// a's first column is k_begin; c's and the factor's first column is column_begin. Rows of c and of the factor reach to
// a multiple of kPanel.
struct GemmTask {
    const float* a;
    int64_t a_pitch, rows;
    Linear w;
    int64_t k_begin, k_end, k_block;   // k_block: at most kDepth
    int64_t column_begin, column_end;  // multiples of kPanel
    float* c;
    int64_t c_pitch;
    bool accumulate;  // add to what c holds even at k = 0
    After after;
    const float* factor;  // kMultiply
    int64_t factor_pitch;
};

// out = norm(in) * weight + bias + residual, row by row; every part after `in` is optional. No row is read or written
// beyond `channels`. `out` may be `in` or `residual`.
struct RowsTask {
    const float* in;
    int64_t in_pitch;
    const float* residual;  // or null
    int64_t residual_pitch;
    float* out;
    int64_t out_pitch;
    int64_t rows, channels;
    bool norm;
    float eps;
    const float *weight, *bias;  // of the norm, or null
};

struct Norm {
    const float *weight, *bias;
    float eps;
};

struct FocalWeight;

struct Block {
    int64_t B, H, W, C, L;
    const float* hidden_state;  // (B, H, W, C), contiguous
    float* result;              // the same
    Linear projection_in, projection_context, projection_out, fc1, fc2;
    const FocalWeight* focal_weights;  // L of them
    bool normalize_modulator;
    bool post_norm;  // norm1 and norm2 behind their branch, not before it
    Norm norm1, norm2;
    bool norm_in_modulation;
    Norm modulation_norm;
};

void block(const Block& block);

}  // namespace focalnet::cpu
