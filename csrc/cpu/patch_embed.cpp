// The operator focalnet::cpu_patch_embed: a strided convolution with little or no overlap (stem, downsampling), bias
// and LayerNorm.
//
//     input (B, H, W, C), any strides
//       |  gather: one row per token, its kh x kw window as (c, i, j), which is the column order of a convolution's
//       |  weight; zeros where the window leaves the map
//     patches [rows][C kh kw]     scratch of a thread, in L2; in the element of a product's operands, as in block.cpp
//       |  product; as in block.cpp, weights are read in place and no packed copy outlives the call
//     tokens [rows][N]            scratch
//       |  [LayerNorm]
//     result (B, h, w, N)
//
// A thread owns a block of tokens and does all three steps for it. The input is read once (again from L1 and L2 where
// windows overlap), the result is written once, and the weights are streamed once per block.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "block.h"
#include "cache_sizes.h"
#include "checks.h"
#include "gated_aggregation.h"
#include "gemm_driver.h"
#include "isa.h"
#include "parameters.h"
#include "scratch.h"
#include "work_sharing.h"

namespace focalnet::cpu {
namespace {

// Scratch of one thread, for l2_share: half of the L2.
constexpr int64_t kScratchBytes = 256 * 1024;

thread_local Memory shared_memory, own_memory, packed_memory;

struct Input {
    const void* data;
    Element element;
    int64_t B, H, W, C;
    int64_t stride_b, stride_h, stride_w, stride_c;
};

struct Window {
    int64_t kh, kw, stride_h, stride_w, top, left;
    int64_t h, w;  // of the result
};

// A float32 that is rounded to bfloat16: Element::kRounded.
struct RoundedFloat {
    float value;
    RoundedFloat() = default;
    RoundedFloat(float v) : value(static_cast<float>(static_cast<BF16>(v))) {}
};

// out[4 c + i] = from[i][c]: a 2 x 2 window of a channels-last map.
template <typename In, typename Out>
void interleave(const In* const (&from)[4], int64_t C, Out* __restrict out) {
    for (int64_t c = 0; c < C; ++c)
        for (int64_t i = 0; i < 4; ++i) out[4 * c + i] = static_cast<Out>(from[i][c]);
}

// Gathers the window whose first pixel is (y, x) of image b.
template <typename In, typename Out>
void gather_window(const Input& in, const Window& w, int64_t b, int64_t y, int64_t x, Out* out) {
    const int64_t i0 = std::clamp<int64_t>(-y, 0, w.kh), i1 = std::clamp<int64_t>(in.H - y, i0, w.kh);
    const int64_t j0 = std::clamp<int64_t>(-x, 0, w.kw), j1 = std::clamp<int64_t>(in.W - x, j0, w.kw);
    const bool inside = i1 - i0 == w.kh && j1 - j0 == w.kw;
    if (!inside) std::fill(out, out + in.C * w.kh * w.kw, static_cast<Out>(0.0f));
    const In* first = static_cast<const In*>(in.data) + b * in.stride_b + y * in.stride_h + x * in.stride_w;
    if (inside && w.kh == 2 && w.kw == 2 && in.stride_c == 1)
        return interleave<In>({first, first + in.stride_w, first + in.stride_h, first + in.stride_h + in.stride_w},
                              in.C, out);
    for (int64_t c = 0; c < in.C; ++c, out += w.kh * w.kw)
        for (int64_t i = i0; i < i1; ++i) {
            const In* from = first + c * in.stride_c + i * in.stride_h;
            for (int64_t j = j0; j < j1; ++j) out[i * w.kw + j] = static_cast<Out>(from[j * in.stride_w]);
        }
}

struct Embedding {
    Input in;
    Window window;
    Linear projection;
    bool normed;
    Norm norm;
    Matrix result;
    Products products;
    Threads threads;

    int64_t tokens() const { return in.B * window.h * window.w; }
    // A row of scratch holds a patch and the result of its product.
    int64_t patch_bytes() const { return pitch_bytes(projection.K, products.a); }
    int64_t row_bytes() const { return patch_bytes() + pitch_bytes(projection.N, Element::kFloat32); }
    int64_t rows_in_scratch() const { return l2_share(kScratchBytes) / row_bytes(); }

    Matrix patches(float* memory) const { return {memory, patch_bytes() / size_of(products.a), products.a}; }
    Matrix embedded(float* memory, int64_t rows) const {
        return {memory + rows * patch_bytes() / 4, pitch_of(projection.N, Element::kFloat32), Element::kFloat32};
    }

    template <typename In, typename Out>
    void gather_as(int64_t token, int64_t rows, const Matrix& to) const {
        Out* out = static_cast<Out*>(to.data);
        for (int64_t r = 0; r < rows; ++r, ++token, out += to.pitch) {
            const int64_t x = token % window.w, y = token / window.w % window.h, b = token / (window.w * window.h);
            gather_window<In>(in, window, b, y * window.stride_h - window.top, x * window.stride_w - window.left, out);
        }
    }

    template <typename In>
    void gather_from(int64_t token, int64_t rows, const Matrix& to) const {
        if (to.element == Element::kBFloat16) return gather_as<In, BF16>(token, rows, to);
        if (to.element == Element::kRounded) return gather_as<In, RoundedFloat>(token, rows, to);
        gather_as<In, float>(token, rows, to);
    }

    void gather(int64_t token, int64_t rows, const Matrix& to) const {
        in.element == Element::kBFloat16 ? gather_from<BF16>(token, rows, to) : gather_from<float>(token, rows, to);
    }

    // Computes `rows` rows of the result, from token `token` on, from their patches.
    template <typename By>
    void embed(const By& by, int64_t token, int64_t rows, const Matrix& patches, const Matrix& out) const {
        by.gemm(product(products, projection, patches, rows, out));
        by.rows(
            {out, Matrix{}, rows_from(result, token), rows, projection.N, normed, norm.eps, norm.weight, norm.bias});
    }
};

// For few tokens: each thread streams its part of the weights instead of all of them.
void embed_together(const Embedding& e) {
    float* memory = shared_memory.get(e.tokens() * e.row_bytes() / 4);
    const Matrix patches = e.patches(memory);
    share_rows(e.threads, e.tokens(), 4,
               [&](int64_t begin, int64_t end) { e.gather(begin, end - begin, rows_from(patches, begin)); });
    e.embed(Together{e.products, e.threads}, 0, e.tokens(), patches, e.embedded(memory, e.tokens()));
}

void embed_by_blocks(const Embedding& e) {
    const int64_t rows = rows_of_block(e.rows_in_scratch());
    share_tokens(e.threads, e.tokens(), rows, [&](int64_t first, int64_t n) {
        float* memory = own_memory.get(rows * e.row_bytes() / 4);
        const Matrix patches = e.patches(memory);
        e.gather(first, n, patches);
        e.embed(Alone{e.products}, first, n, patches, e.embedded(memory, rows));
    });
}

void patch_embed(Embedding e) {
    if (by_columns(e.threads, e.tokens(), e.rows_in_scratch())) return embed_together(e);
    pack(e.threads, e.products, {&e.projection}, packed_memory);
    embed_by_blocks(e);
}

void check_pair(const char* name, const std::vector<int64_t>& pair, int64_t least) {
    STD_TORCH_CHECK(pair.size() == 2 && pair[0] >= least && pair[1] >= least, name, " is ", text(pair),
                    "; expected two values of at least ", least);
}

Tensor cpu_patch_embed(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                       std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> output_size,
                       std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, std::optional<double> eps,
                       bool own_threads, bool rounded_weights) {
    const Weights as = Weights::like("weight", weight, rounded_weights);
    const Element element = as.element, read = as.of("weight", weight), given = map_element("input", input, element);
    check_map_shape("input", input);
    check_pair("stride", stride, 1);
    check_pair("padding", padding, 0);
    check_pair("output_size", output_size, 1);
    const Input in{input.const_data_ptr(), given,           input.size(0),   input.size(1),   input.size(2),
                   input.size(3),          input.stride(0), input.stride(1), input.stride(2), input.stride(3)};
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) >= 1 && weight.size(1) == in.C && weight.size(2) >= 1 &&
                        weight.size(3) >= 1,
                    "weight has shape ", text(shape_of(weight)), "; expected (N, ", in.C, ", kh, kw)");
    const int64_t N = weight.size(0), kh = weight.size(2), kw = weight.size(3);
    Kept kept;
    Norm norm{};
    if (eps.has_value()) norm = norm_over(kept, "norm", norm_weight, norm_bias, *eps, N);
    Tensor result = torch::stable::new_empty(input, Shape{in.B, output_size[0], output_size[1], N}, dtype_of(element));
    patch_embed({in,
                 {kh, kw, stride[0], stride[1], padding[0], padding[1], output_size[0], output_size[1]},
                 {kept(weight), read, vector(kept, "bias", bias, N), nullptr, in.C * kh * kw, N},
                 eps.has_value(),
                 norm,
                 {result.mutable_data_ptr(), N, element},
                 products_of(element),
                 own_threads ? Threads::kOwn : Threads::kTorch});
    return result;
}

}  // namespace
}  // namespace focalnet::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(focalnet, m) {
    m.def(
        "cpu_patch_embed(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] output_size, "
        "Tensor? norm_weight, Tensor? norm_bias, float? eps, bool own_threads=False, "
        "bool rounded_weights=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(focalnet, CPU, m) { m.impl("cpu_patch_embed", TORCH_BOX(&focalnet::cpu::cpu_patch_embed)); }
