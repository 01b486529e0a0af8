// What the driver of the fused block and its kernels agree on. Plain data only, as in gated_aggregation.h.

#pragma once

#include <cstdint>

#include "gated_aggregation.h"

namespace focalnet::cpu {

// Columns of a panel of packed weights: one cache line of float32, whatever the instruction set.
constexpr int64_t kPanel = 16;

constexpr int64_t kDepth = 256;      // k of a panel's slice at most: 16 KB of L1, beside the rows of a tile
constexpr int64_t kDotDepth = 1024;  // the same of bfloat16 products, see dot_gemm.inc

// Rows of a matrix, in elements.
struct Matrix {
    void* data;
    int64_t pitch;
    Element element;
};

// A linear layer, K -> N: weights and bias as a module has them.
struct Linear {
    const void* weight;  // (N, K)
    Element element;     // of the weights; kRounded: float32, rounded to bfloat16 as it is read
    const float* bias;   // (N), or null
    const float* scale;  // (N), of weights and bias, or null
    int64_t K, N;
    // A copy in scratch, as the product's own packing lays it out; the three above are not read then. Null: every
    // product packs slice by slice what it reads.
    const float* packed = nullptr;
};

// What happens to a tile of the product while it is in L1.
enum class After : int { kNothing, kGelu, kMultiply };

// c[:, columns] (+)= a[:, k_begin:k_end] @ W[columns, k_begin:k_end]^T, with W's bias at k = 0 and `after` at k = K.
// a's first column is k_begin; c's and the factor's first column is column_begin. Rows of c and of the factor reach to
// a multiple of kPanel.
struct GemmTask {
    Matrix a;
    int64_t rows;
    Linear w;
    int64_t k_begin, k_end, k_block;
    int64_t column_begin, column_end;  // multiples of kPanel
    Matrix c;
    bool accumulate;  // add to what c holds even at k = 0
    After after;
    Matrix factor;  // kMultiply
};

// How products are computed. In float32: a of float32, weights of any element, c of float32 or kRounded. By dot
// products: a of bfloat16, weights of bfloat16 or kRounded, c of bfloat16 or, if nothing comes after, float32.
struct Products {
    Element a;
    int64_t depth;               // k of a block at most
    int64_t header, words_of_k;  // of a packed panel: rows of kPanel floats before the weights; k in a row
    void (*pack)(const Linear&, int64_t column, float* panel);
    void (*gemm)(const GemmTask&);
};

extern const Products kDotProducts, kEmulatedDotProducts;

// out = norm(in) * weight + bias + residual, row by row; every part after `in` is optional. No row is read or written
// beyond `channels`. `out` may be `in` or `residual`.
struct RowsTask {
    Matrix in;
    Matrix residual;  // or null
    Matrix out;
    int64_t rows, channels;
    bool norm;
    float eps;
    const float *weight, *bias;  // of the norm, or null
};

struct Norm {
    const float *weight, *bias;
    float eps;
};

struct Block {
    int64_t B, H, W, C, L;
    Matrix hidden_state;  // (B, H, W, C), contiguous
    Matrix result;        // the same, of the same element or float32
    Element element;      // of projection and agg, the maps between the steps; of the weights of linear layers
    Linear projection_in, projection_context, projection_out, fc1, fc2;
    const FocalWeight* focal_weights;  // L of them
    bool normalize_modulator;
    bool post_norm;  // norm1 and norm2 behind their branch, not before it
    Norm norm1, norm2;
    bool norm_in_modulation;
    Norm modulation_norm;
    Threads threads;
};

void block(const Block& block);

}  // namespace focalnet::cpu
