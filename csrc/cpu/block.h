// The interface between the driver of the fused block and its kernels. Plain data only, as in gated_aggregation.h.

#pragma once

#include <cstdint>

#include "gated_aggregation.h"

namespace focalnet::cpu {

// Columns of a panel of packed weights: one cache line of float32 on every instruction set.
constexpr int64_t kPanel = 16;

// Largest k of a slice of a float32 panel. The slice takes 16 KB of L1, which it shares with the rows of a tile.
constexpr int64_t kDepth = 256;
// The same for bfloat16 products, see dot_gemm.inc.
constexpr int64_t kDotDepth = 1024;

// A row-major matrix. The pitch counts elements.
struct Matrix {
    void* data;
    int64_t pitch;
    Element element;
};

// A linear layer, K -> N, with weights and bias as the module stores them.
struct Linear {
    const void* weight;  // (N, K)
    Element element;     // kRounded: float32 weights, rounded to bfloat16 when read
    const float* bias;   // (N), or null
    const float* scale;  // (N), multiplies weights and bias, or null
    int64_t K, N;
    bool transposed = false;  // weight is (K, N) in memory, as in a product of backward; not kRounded
    // A copy in scratch, laid out by Products::pack. It replaces weight, bias and scale. If null, every product packs
    // the slices it reads.
    const float* packed = nullptr;
};

// Epilogue of a product, applied to each tile while it is in L1.
enum class After : int { kNothing, kGelu, kMultiply };

// c[:, columns] (+)= a[:, k_begin:k_end] @ W[columns, k_begin:k_end]^T. The bias is added with k = 0, and the epilogue
// applied once k = K is reached. Column 0 of a is k_begin; column 0 of c and of the factor is column_begin. Rows of c
// and of the factor are padded to a multiple of kPanel.
struct GemmTask {
    Matrix a;
    int64_t rows;
    Linear w;
    int64_t k_begin, k_end, k_block;
    int64_t column_begin, column_end;  // multiples of kPanel
    Matrix c;
    bool accumulate;  // add to c even at k = 0
    After after;
    Matrix factor;  // of kMultiply
};

// dw (+)= dy^T x over `tokens` rows, and the sums of dy's columns: the gradients of a linear layer's weights and bias.
struct WeightGradientTask {
    const void* dy;  // (tokens, N)
    const void* x;   // (tokens, K), in the same element
    int64_t dy_pitch, x_pitch, N, K, tokens;
    float* dw;  // (N, K)
    int64_t dw_pitch;
    float* sums;     // (N), or null
    bool add;        // to dw and sums
    float* scratch;  // weight_gradient_floats(N, K)
};

// Tokens that a weight gradient packs at a time.
constexpr int64_t kTokens = 256;

constexpr int64_t weight_gradient_floats(int64_t N, int64_t K) {
    // Panels of 6 or 12 rows and of kPanel columns, a cache line apart.
    return ((N + 5) / 6 + 2) * (6 * kTokens + kPanel) + (K + kPanel - 1) / kPanel * (kTokens + 1) * kPanel;
}

// How products are computed:
//     float32         a is float32, weights are of any element, c is float32 or kRounded
//     dot products    a is bfloat16, weights are bfloat16 or kRounded, c is bfloat16, or float32 without an epilogue
struct Products {
    Element a;
    int64_t depth;  // largest k of a block
    // Rows before the weights of a packed panel, and k per row. A row is kPanel floats.
    int64_t header, words_of_k;
    void (*pack)(const Linear&, int64_t column, float* panel);
    void (*gemm)(const GemmTask&);
    void (*weight_gradient)(const WeightGradientTask&);
};

extern const Products kDotProducts, kAmxProducts, kEmulatedDotProducts, kEmulatedAmxProducts;

// out = norm(in) * weight + bias + residual, row by row. Only `in` and `out` are required. Nothing beyond `channels`
// is read or written in any row. `out` may be `in` or `residual`.
struct RowsTask {
    Matrix in;
    Matrix residual;  // may be null
    Matrix out;
    int64_t rows, channels;
    bool norm;
    float eps;
    const float *weight, *bias;  // of the norm; may be null
};

struct Norm {
    const float *weight, *bias;
    float eps;
};

struct Block {
    int64_t B, H, W, C, L;
    Matrix hidden_state;  // (B, H, W, C), contiguous
    Matrix result;        // (B, H, W, C), contiguous, in hidden_state's element or float32
    Element element;      // of projection and agg, and of the weights of linear layers
    Linear projection_in, projection_context, projection_out, fc1, fc2;
    const FocalWeight* focal_weights;  // [L]
    bool normalize_modulator;
    bool post_norm;  // norm1 and norm2 follow their branch
    Norm norm1, norm2;
    bool norm_in_modulation;
    Norm modulation_norm;
    Threads threads;
};

void block(const Block& block);

}  // namespace focalnet::cpu
