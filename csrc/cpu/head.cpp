// The head in inference, after the last stage: focalnet::cpu_norm_mean and focalnet::cpu_linear.
//
//     hidden_state (B, H, W, C)
//       |  LayerNorm, row by row                       read and written once
//     tokens (B, H W, C)
//       |  sums over an image's tokens, in float64     read from L2
//     mean (B, C)
//       |  one product by columns, as in block.cpp     reads the weights once, for any B
//     logits (B, N)
//
// PyTorch has operators for all of this. But their threads would keep spinning after the last one, into the next
// forward.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "block.h"
#include "checks.h"
#include "gated_aggregation.h"
#include "gemm_driver.h"
#include "isa.h"
#include "parameters.h"
#include "scratch.h"
#include "work_sharing.h"

namespace focalnet::cpu {
namespace {

// Channels of an image that a thread sums at a time.
constexpr int64_t kChannels = 64;
constexpr int64_t kLeastTokens = 32;

thread_local Memory product_memory;

template <typename T>
void mean_of(const T* tokens, int64_t n, int64_t C, int64_t channels, T* mean) {
    double sums[kChannels] = {};
    for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < channels; ++c) sums[c] += static_cast<double>(static_cast<float>(tokens[i * C + c]));
    for (int64_t c = 0; c < channels; ++c)
        mean[c] = static_cast<T>(static_cast<float>(sums[c] / static_cast<double>(n)));
}

template <typename T>
void means(const Tensor& tokens, Tensor& mean) {
    const int64_t B = tokens.size(0), n = tokens.size(1), C = tokens.size(2), blocks = ceil_div(C, kChannels);
    const T* from = static_cast<const T*>(tokens.const_data_ptr());
    T* to = static_cast<T*>(mean.mutable_data_ptr());
    share_rows(Threads::kOwn, B * blocks, ceil_div(kLeastTokens, n), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / blocks, c = i % blocks * kChannels;
            mean_of(from + b * n * C + c, n, C, std::min(kChannels, C - c), to + b * C + c);
        }
    });
}

std::tuple<Tensor, Tensor> cpu_norm_mean(const Tensor& hidden_state, std::optional<Tensor> norm_weight,
                                         std::optional<Tensor> norm_bias, double eps) {
    const Element element = element_of("hidden_state", hidden_state);
    check_map_shape("hidden_state", hidden_state);
    const int64_t B = hidden_state.size(0), n = hidden_state.size(1) * hidden_state.size(2), C = hidden_state.size(3);
    Kept kept;
    const Norm norm = norm_over(kept, "norm", norm_weight, norm_bias, eps, C);
    Tensor tokens = torch::stable::new_empty(hidden_state, Shape{B, n, C});
    Tensor mean = torch::stable::new_empty(hidden_state, Shape{B, C});
    const Together together{products_of(element), Threads::kOwn};
    together.rows({{const_cast<void*>(kept(hidden_state)), C, element},
                   {},
                   {tokens.mutable_data_ptr(), C, element},
                   B * n,
                   C,
                   true,
                   norm.eps,
                   norm.weight,
                   norm.bias});
    element == Element::kFloat32 ? means<float>(tokens, mean) : means<BF16>(tokens, mean);
    return {tokens, mean};
}

Tensor cpu_linear(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, bool rounded_weights) {
    const Weights as = Weights::like("weight", weight, rounded_weights);
    const Element element = as.element, read_as = as.of("weight", weight);
    const Element given = map_element("input", input, element);
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) >= 1, "weight has shape ",
                    text(shape_of(weight)), "; expected (N, K)");
    const int64_t N = weight.size(0), K = weight.size(1), rows = input.size(0);
    STD_TORCH_CHECK(input.dim() == 2 && input.size(1) == K, "input has shape ", text(shape_of(input)),
                    "; expected (B, ", K, ")");
    Kept kept;
    Tensor result = torch::stable::new_empty(input, Shape{rows, N}, dtype_of(element));
    if (rows == 0) return result;
    const Products products = products_of(element);
    const Linear linear{kept(weight), read_as, vector(kept, "bias", bias, N), nullptr, K, N};
    // Products need rows padded to whole panels.
    const int64_t read = pitch_bytes(K, products.a), written = pitch_bytes(N, Element::kFloat32);
    float* memory = product_memory.get(rows * (read + written) / 4);
    const Matrix a{memory, read / size_of(products.a), products.a};
    const Matrix c{memory + rows * read / 4, written / 4, Element::kFloat32};
    const Together together{products, Threads::kOwn};
    const auto copy = [&](const Matrix& from, const Matrix& to, int64_t columns) {
        together.rows({from, {}, to, rows, columns, false, 0.0f, nullptr, nullptr});
    };
    copy({const_cast<void*>(kept(input)), K, given}, a, K);
    together.gemm(product(products, linear, a, rows, c));
    copy(c, {result.mutable_data_ptr(), N, element}, N);
    return result;
}

}  // namespace
}  // namespace focalnet::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(focalnet, m) {
    m.def("cpu_norm_mean(Tensor hidden_state, Tensor? norm_weight, Tensor? norm_bias, float eps) -> (Tensor, Tensor)");
    m.def("cpu_linear(Tensor input, Tensor weight, Tensor? bias, bool rounded_weights=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(focalnet, CPU, m) {
    m.impl("cpu_norm_mean", TORCH_BOX(&focalnet::cpu::cpu_norm_mean));
    m.impl("cpu_linear", TORCH_BOX(&focalnet::cpu::cpu_linear));
}
