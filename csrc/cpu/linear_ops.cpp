// Linear layers in training: focalnet::cpu_linear_fwd and focalnet::cpu_linear_bwd.
//
//     y = (x W^T + b) [* factor]          x (rows, K), W (N, K)
//     dx = dy W,   dW = dy^T x,   db = sum of dy over the rows
//
// Packed weights are scratch; a block of rows passes through L2 once for all columns. dW is computed in ranges of its
// rows and columns (products.h), and db with it, while the rows of dy are in L2.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "block.h"
#include "checks.h"
#include "gemm_driver.h"
#include "isa.h"
#include "parameters.h"
#include "products.h"
#include "scratch.h"
#include "work_sharing.h"

namespace focalnet::cpu {
namespace {

thread_local Memory packed_memory, rows_memory, gradient_memory;

// c = (a W^T + b) * factor; the factor may be null. Columns beyond the last whole panel are computed in scratch.
void multiply(Linear w, Matrix a, int64_t rows, Matrix c, Matrix factor = {}) {
    const Products products = products_of(a.element);
    const int64_t padded = round_up(w.N, kPanel), bytes = size_of(a.element) * (w.K + padded);
    const auto task = [&](int64_t first, int64_t n, const Matrix& to) {
        GemmTask made = product(products, w, rows_from(a, first), n, to);
        made.after = factor.data == nullptr ? After::kNothing : After::kMultiply;
        made.factor = rows_from(factor, first);
        return made;
    };
    if (padded == w.N && by_columns(Threads::kTorch, rows, rows_in_l2(bytes)))
        return Together{products, Threads::kTorch}.gemm(task(0, rows, c));
    Linear* const layers[] = {&w};
    pack(Threads::kTorch, products, layers, packed_memory);
    share_tokens(Threads::kTorch, rows, rows_of_block_of(bytes), [&](int64_t first, int64_t n) {
        const Matrix out = rows_from(c, first);
        if (padded == w.N) return products.gemm(task(first, n, out));
        const Matrix scratch = matrix(rows_memory.get(n * padded), padded, a.element);
        products.gemm(task(first, n, scratch));
        current_kernels().normalize_and_add({scratch, {}, out, n, w.N, false, 0.0f, nullptr, nullptr});
    });
}

struct Layer {
    Element element;
    int64_t rows, K, N;

    Layer(const Tensor& x, const Tensor& weight) {
        STD_TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0, "weight has shape ", text(shape_of(weight)),
                        "; expected (N, K), of at least 1 each");
        STD_TORCH_CHECK(x.dim() == 2, "x has ", x.dim(), " dimensions; expected 2, (rows, K)");
        element = trained_element("x", x);
        rows = x.size(0), K = weight.size(1), N = weight.size(0);
        check_matrix("x", x, element, {rows, K});
        check_matrix("weight", weight, element, {N, K});
    }
};

// The factor as a matrix, whose rows may have any pitch.
Matrix factor_of(const Tensor& factor, const Layer& layer) {
    check_matrix("factor", factor, layer.element, {layer.rows, layer.N});
    STD_TORCH_CHECK(layer.N % kPanel == 0 && factor.stride(1) == 1, "factor has ", layer.N, " columns of stride ",
                    factor.stride(1), "; expected a multiple of ", kPanel, ", of stride 1");
    return matrix(factor.const_data_ptr(), factor.stride(0), layer.element);
}

Tensor cpu_linear_fwd(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                      std::optional<Tensor> factor) {
    const Layer layer(x, weight);
    Kept kept;
    Tensor y = new_rows(x, layer.rows, layer.N);
    const Linear linear{kept(weight), layer.element, vector(kept, "bias", bias, layer.N), nullptr, layer.K, layer.N};
    multiply(linear, matrix(kept(x), layer.K, layer.element), layer.rows,
             matrix(y.mutable_data_ptr(), layer.N, layer.element),
             factor.has_value() ? factor_of(*factor, layer) : Matrix{});
    return y;
}

std::vector<Tensor> cpu_linear_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight, bool need_x,
                                   bool need_weight) {
    const Layer layer(x, weight);
    check_matrix("dy", dy, layer.element, {layer.rows, layer.N});
    Kept kept;
    const void* dys = kept(dy);
    Tensor dx = need_x ? new_rows(x, layer.rows, layer.K) : torch::stable::new_empty(x, Shape{0});
    if (need_x) {
        const Linear linear{kept(weight), layer.element, nullptr, nullptr, layer.N, layer.K, true};
        multiply(linear, matrix(dys, layer.N, layer.element), layer.rows,
                 matrix(dx.mutable_data_ptr(), layer.K, layer.element));
    }
    ParameterGradients made(x, layer.element, need_weight ? layer.N : 0, layer.K);
    if (need_weight) {
        const GradientGrid grid({dys, kept(x), layer.N, layer.K, layer.N, layer.K, layer.rows, made.weight(), layer.K,
                                 made.bias(), false, nullptr},
                                layer.element, thread_count(Threads::kTorch));
        const Products products = products_of(layer.element);
        share_out(Threads::kTorch, grid.tasks(), [&](auto next) {
            for (int64_t i = next(); i < grid.tasks(); i = next()) grid.run(products, i, gradient_memory);
        });
    }
    return {dx, made.of_weight(), made.of_bias()};
}

}  // namespace
}  // namespace focalnet::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(focalnet, m) {
    m.def("cpu_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? factor=None) -> Tensor");
    m.def("cpu_linear_bwd(Tensor dy, Tensor x, Tensor weight, bool need_x, bool need_weight) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(focalnet, CPU, m) {
    m.impl("cpu_linear_fwd", TORCH_BOX(&focalnet::cpu::cpu_linear_fwd));
    m.impl("cpu_linear_bwd", TORCH_BOX(&focalnet::cpu::cpu_linear_bwd));
}
