// The operator focalnet::cpu_patch_embed: a strided convolution with few overlaps (stem, downsampling), bias and
// LayerNorm.
//
//     input (B, H, W, C), any strides
//       |  gather: one row a token, its kh x kw window as (c, i, j), the order in which a convolution's weight has its
//       |  columns; zeros where the window leaves the map
//     patches [rows][C kh kw]                         scratch of a thread, in L2
//       |  weights as in block.cpp: read in place, nothing made of them outlives the call
//     tokens [rows][N]                                scratch
//       |  [LayerNorm]
//     result (B, h, w, N)
//
// A thread owns a block of tokens and does all three for it: the input is read once (overlapping windows: again from
// L1 and L2), the result written once, the weights streamed once a block.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "block.h"
#include "checks.h"
#include "gated_aggregation.h"
#include "gemm_driver.h"
#include "isa.h"
#include "scratch.h"
#include "work_sharing.h"

namespace focalnet::cpu {
namespace {

constexpr int64_t kScratchBytes = 256 * 1024;  // of a thread: half of a 512 KB L2

thread_local Memory shared_memory, own_memory, packed_memory;

struct Input {
    const float* data;
    int64_t B, H, W, C;
    int64_t stride_b, stride_h, stride_w, stride_c;
};

struct Window {
    int64_t kh, kw, stride_h, stride_w, top, left;
    int64_t h, w;  // of the result
};

// out[4 c + i] = from[i][c]: a 2 x 2 window of a channels-last map.
void interleave(const float* const (&from)[4], int64_t C, float* __restrict out) {
    for (int64_t c = 0; c < C; ++c)
        for (int64_t i = 0; i < 4; ++i) out[4 * c + i] = from[i][c];
}

// The window whose first pixel is (y, x) of image b.
void gather_window(const Input& in, const Window& w, int64_t b, int64_t y, int64_t x, float* out) {
    const int64_t i0 = std::clamp<int64_t>(-y, 0, w.kh), i1 = std::clamp<int64_t>(in.H - y, i0, w.kh);
    const int64_t j0 = std::clamp<int64_t>(-x, 0, w.kw), j1 = std::clamp<int64_t>(in.W - x, j0, w.kw);
    const bool inside = i1 - i0 == w.kh && j1 - j0 == w.kw;
    if (!inside) std::fill(out, out + in.C * w.kh * w.kw, 0.0f);
    const float* first = in.data + b * in.stride_b + y * in.stride_h + x * in.stride_w;
    if (inside && w.kh == 2 && w.kw == 2 && in.stride_c == 1)
        return interleave({first, first + in.stride_w, first + in.stride_h, first + in.stride_h + in.stride_w}, in.C,
                          out);
    for (int64_t c = 0; c < in.C; ++c, out += w.kh * w.kw)
        for (int64_t i = i0; i < i1; ++i) {
            const float* from = first + c * in.stride_c + i * in.stride_h;
            for (int64_t j = j0; j < j1; ++j) out[i * w.kw + j] = from[j * in.stride_w];
        }
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
            gather_window(in, window, b, y * window.stride_h - window.top, x * window.stride_w - window.left, out);
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

void patch_embed(Embedding e) {
    if (by_columns(e.tokens(), e.rows_in_scratch())) return embed_together(e);
    pack(current_kernels(), {&e.projection}, packed_memory);
    embed_by_blocks(e);
}

void check_pair(const char* name, const std::vector<int64_t>& pair, int64_t least) {
    STD_TORCH_CHECK(pair.size() == 2 && pair[0] >= least && pair[1] >= least, name, " is ", text(pair),
                    "; expected two values of at least ", least);
}

Tensor cpu_patch_embed(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                       std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> output_size,
                       std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, std::optional<double> eps) {
    check_float("input", input);
    STD_TORCH_CHECK(input.dim() == 4 && input.size(1) >= 1 && input.size(2) >= 1 && input.size(3) >= 1,
                    "input has shape ", text(shape_of(input)),
                    "; expected (B, H, W, C) with H, W and C of at least 1");
    check_pair("stride", stride, 1);
    check_pair("padding", padding, 0);
    check_pair("output_size", output_size, 1);
    const Input in{data(input),     input.size(0),   input.size(1),   input.size(2),  input.size(3),
                   input.stride(0), input.stride(1), input.stride(2), input.stride(3)};
    check_float("weight", weight);
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) >= 1 && weight.size(1) == in.C && weight.size(2) >= 1 &&
                        weight.size(3) >= 1,
                    "weight has shape ", text(shape_of(weight)), "; expected (N, ", in.C, ", kh, kw)");
    const int64_t N = weight.size(0), kh = weight.size(2), kw = weight.size(3);
    Kept kept;
    Norm norm{};
    if (eps.has_value()) norm = norm_over(kept, "norm", norm_weight, norm_bias, *eps, N);
    Tensor result = torch::stable::new_empty(input, Shape{in.B, output_size[0], output_size[1], N});
    patch_embed({in,
                 {kh, kw, stride[0], stride[1], padding[0], padding[1], output_size[0], output_size[1]},
                 {kept(weight), vector(kept, "bias", bias, N), nullptr, in.C * kh * kw, N},
                 eps.has_value(),
                 norm,
                 static_cast<float*>(result.mutable_data_ptr())});
    return result;
}

}  // namespace
}  // namespace focalnet::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(focalnet, m) {
    m.def(
        "cpu_patch_embed(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] output_size, "
        "Tensor? norm_weight, Tensor? norm_bias, float? eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(focalnet, CPU, m) { m.impl("cpu_patch_embed", TORCH_BOX(&focalnet::cpu::cpu_patch_embed)); }
