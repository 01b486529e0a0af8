// The operator focalnet::cpu_patch_embed: a strided convolution with few overlaps (stem, downsampling), bias and
// LayerNorm.
//
//     input (B, H, W, C), any strides
//       |  gather: one row a token, its kh x kw window as (i, j, c); zeros where the window leaves the map
//     patches [rows][kh kw C]                         scratch of a thread, in L2
//       |  packed weights, see gemm.inc
//     tokens [rows][N]                                scratch
//       |  [LayerNorm]
//     result (B, h, w, N)
//
// A thread owns a block of tokens and does all three for it: the input is read once (overlapping windows: again from
// L1 and L2), the result written once, the weights streamed once a block.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "block.h"
#include "checks.h"
#include "gated_aggregation.h"
#include "isa.h"
#include "memory.h"
#include "product.h"
#include "share.h"

namespace focalnet::cpu {
namespace {

constexpr int64_t kScratchBytes = 256 * 1024;  // of a thread: half of a 512 KB L2

thread_local Memory shared_memory, own_memory;

struct Input {
    const float* data;
    int64_t B, H, W, C;
    int64_t stride_b, stride_h, stride_w, stride_c;
};

struct Window {
    int64_t kh, kw, stride_h, stride_w, top, left;
    int64_t h, w;  // of the result
};

// kw pixels of C channels from (y, x) on.
void gather_row(const Input& in, int64_t b, int64_t y, int64_t x, int64_t kw, float* out) {
    if (y < 0 || y >= in.H) {
        std::fill(out, out + kw * in.C, 0.0f);
        return;
    }
    const int64_t begin = std::clamp<int64_t>(-x, 0, kw), end = std::clamp<int64_t>(in.W - x, begin, kw);
    std::fill(out, out + begin * in.C, 0.0f);
    std::fill(out + end * in.C, out + kw * in.C, 0.0f);
    const float* from = in.data + b * in.stride_b + y * in.stride_h + (x + begin) * in.stride_w;
    out += begin * in.C;
    if (in.stride_c == 1 && in.stride_w == in.C) {
        std::memcpy(out, from, (end - begin) * in.C * sizeof(float));
        return;
    }
    for (int64_t c = 0; c < in.C; ++c)
        for (int64_t j = 0; j < end - begin; ++j) out[j * in.C + c] = from[c * in.stride_c + j * in.stride_w];
}

struct Embedding {
    Input in;
    Window window;
    Linear projection;
    bool normed;
    Norm norm;
    float* result;

    int64_t tokens() const { return in.B * window.h * window.w; }
    int64_t pitch() const { return pitch_of(projection.K); }
    int64_t out_pitch() const { return pitch_of(projection.N); }
    int64_t row_floats() const { return pitch() + out_pitch(); }
    int64_t rows_in_scratch() const { return kScratchBytes / 4 / row_floats(); }

    void gather(int64_t token, int64_t rows, float* out) const {
        for (int64_t r = 0; r < rows; ++r, ++token, out += pitch()) {
            const int64_t x = token % window.w, y = token / window.w % window.h, b = token / (window.w * window.h);
            for (int64_t i = 0; i < window.kh; ++i)
                gather_row(in, b, y * window.stride_h - window.top + i, x * window.stride_w - window.left, window.kw,
                           out + i * window.kw * in.C);
        }
    }

    // Patches to result, for the rows from one token on.
    template <typename By>
    void embed(const By& by, int64_t token, int64_t rows, const float* patches, float* out) const {
        const Linear& w = projection;
        by.gemm({patches, pitch(), rows, w, 0, w.K, k_block(w.K), 0, round_up(w.N, kPanel), out, out_pitch(), false,
                 After::kNothing, nullptr, 0});
        by.rows({out, out_pitch(), nullptr, 0, result + token * w.N, w.N, rows, w.N, normed, norm.eps, norm.weight,
                 norm.bias});
    }
};

// Few tokens: each thread streams its part of the weights, not all of them.
void embed_together(const Embedding& e) {
    float* patches = shared_memory.get(e.tokens() * e.row_floats());
    torch::stable::parallel_for(0, e.tokens(), 4, [&](int64_t begin, int64_t end) {
        e.gather(begin, end - begin, patches + begin * e.pitch());
    });
    e.embed(Together{current_kernels()}, 0, e.tokens(), patches, patches + e.tokens() * e.pitch());
}

void embed_by_blocks(const Embedding& e) {
    const int64_t rows = rows_of_block(e.rows_in_scratch());
    share_tokens(e.tokens(), rows, [&](int64_t first, int64_t n) {
        float* patches = own_memory.get(rows * e.row_floats());
        e.gather(first, n, patches);
        e.embed(Alone{current_kernels()}, first, n, patches, patches + rows * e.pitch());
    });
}

void patch_embed(const Embedding& e) {
    by_columns(e.tokens(), e.rows_in_scratch()) ? embed_together(e) : embed_by_blocks(e);
}

void check_pair(const char* name, const std::vector<int64_t>& pair, int64_t least) {
    STD_TORCH_CHECK(pair.size() == 2 && pair[0] >= least && pair[1] >= least, name, " is ", text(pair),
                    "; expected two values of at least ", least);
}

Tensor cpu_patch_embed(const Tensor& input, const Tensor& weight, std::vector<int64_t> kernel_size,
                       std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> output_size,
                       int64_t channels, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                       std::optional<double> eps) {
    check_float("input", input);
    STD_TORCH_CHECK(input.dim() == 4 && input.size(1) >= 1 && input.size(2) >= 1 && input.size(3) >= 1,
                    "input has shape ", text(shape_of(input)),
                    "; expected (B, H, W, C) with H, W and C of at least 1");
    check_pair("kernel_size", kernel_size, 1);
    check_pair("stride", stride, 1);
    check_pair("padding", padding, 0);
    check_pair("output_size", output_size, 1);
    STD_TORCH_CHECK(channels >= 1, "channels is ", channels, "; expected at least 1");
    STD_TORCH_CHECK(norm_weight.has_value() == eps.has_value() && norm_bias.has_value() == eps.has_value(),
                    "norm_weight, norm_bias, eps: expected all three (a LayerNorm) or none, got some");
    const Input in{data(input),     input.size(0),   input.size(1),   input.size(2),  input.size(3),
                   input.stride(0), input.stride(1), input.stride(2), input.stride(3)};
    Kept kept;
    const Linear projection = packed_linear(kept, "weight", weight, kernel_size[0] * kernel_size[1] * in.C, channels);
    Norm norm{};
    if (eps.has_value()) {
        check_shape("norm_weight", *norm_weight, {channels});
        check_shape("norm_bias", *norm_bias, {channels});
        norm = {kept(*norm_weight), kept(*norm_bias), static_cast<float>(*eps)};
    }
    Tensor result = torch::stable::new_empty(input, Shape{in.B, output_size[0], output_size[1], channels});
    patch_embed({in,
                 {kernel_size[0], kernel_size[1], stride[0], stride[1], padding[0], padding[1], output_size[0],
                  output_size[1]},
                 projection,
                 eps.has_value(),
                 norm,
                 static_cast<float*>(result.mutable_data_ptr())});
    return result;
}

}  // namespace
}  // namespace focalnet::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(focalnet, m) {
    m.def(
        "cpu_patch_embed(Tensor input, Tensor weight, int[] kernel_size, int[] stride, int[] padding, "
        "int[] output_size, int channels, Tensor? norm_weight, Tensor? norm_bias, float? eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(focalnet, CPU, m) { m.impl("cpu_patch_embed", TORCH_BOX(&focalnet::cpu::cpu_patch_embed)); }
