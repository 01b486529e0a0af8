// An MLP in training: focalnet::cpu_mlp_fwd and focalnet::cpu_mlp_bwd.
//
//     y = GELU(x W_1^T + b_1) W_2^T + b_2          x (tokens, C), fc1 = x W_1^T + b_1 (tokens, hidden) is saved
//
// Forward, for a block of tokens that one thread owns: fc1 is written once, its GELU stays in the thread's L2.
//
// Backward goes through the tokens in chunks. A chunk's hidden units stay in the last-level cache:
//
//     1  by tokens      dact = dy W_2;   act = GELU(fc1);   dfc1 = dact GELU'(fc1)     reads fc1, writes act and dfc1
//     2  by tasks       dW_2 += dy^T act,  dW_1 += dfc1^T x,  biases                   ranges of the gradients
//                       dx = dfc1 W_1                                                  blocks of tokens
//
// The size of a chunk depends on the number of hidden units alone, so no result depends on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "block.h"
#include "checks.h"
#include "gelu_rows.h"
#include "gemm_driver.h"
#include "isa.h"
#include "parameters.h"
#include "products.h"
#include "scratch.h"
#include "work_sharing.h"

namespace focalnet::cpu {
namespace {

constexpr Threads kThreads = Threads::kTorch;

// Hidden units of a chunk, for all its tokens: 4 MB of act and 4 MB of dfc1.
constexpr int64_t kChunkUnits = 1 << 20;

thread_local Memory packed_memory, own_memory, chunk_memory;

struct Sizes {
    Element element;
    int64_t tokens, C, hidden, N;

    Sizes(const Tensor& x, const Tensor& weight1, const Tensor& weight2) {
        STD_TORCH_CHECK(x.dim() == 2, "x has ", x.dim(), " dimensions; expected 2, (tokens, channels)");
        STD_TORCH_CHECK(weight1.dim() == 2 && weight2.dim() == 2, "weight1 and weight2 have ", weight1.dim(), " and ",
                        weight2.dim(), " dimensions; expected 2");
        tokens = x.size(0), C = x.size(1), hidden = weight1.size(0), N = weight2.size(0);
        element = trained_element("x", x);
        check_matrix("x", x, element, {tokens, C});
        check_matrix("weight1", weight1, element, {hidden, C});
        check_matrix("weight2", weight2, element, {N, hidden});
        for (const int64_t size : {C, hidden, N})
            STD_TORCH_CHECK(size > 0 && size % kPanel == 0, "the MLP is ", C, " -> ", hidden, " -> ", N,
                            " units wide; expected positive multiples of ", kPanel);
    }
};

Linear layer(const void* weight, Element element, const float* bias, int64_t K, int64_t N, bool transposed = false) {
    return {weight, element, bias, nullptr, K, N, transposed};
}

// Rows of hidden units in scratch. `memory` has pitch / 4 * size_of(element) floats for each row.
struct Units {
    Element element;
    int64_t pitch;

    explicit Units(const Sizes& s) : element(s.element), pitch(pitch_of(s.hidden, s.element)) {}
    int64_t floats(int64_t rows) const { return rows * pitch * size_of(element) / 4; }
    Matrix at(float* memory) const { return {memory, pitch, element}; }
};

std::vector<Tensor> cpu_mlp_fwd(const Tensor& x, const Tensor& weight1, std::optional<Tensor> bias1,
                                const Tensor& weight2, std::optional<Tensor> bias2) {
    const Sizes s(x, weight1, weight2);
    Kept kept;
    Tensor y = new_rows(x, s.tokens, s.N), fc1 = new_rows(x, s.tokens, s.hidden);
    Linear first = layer(kept(weight1), s.element, vector(kept, "bias1", bias1, s.hidden), s.C, s.hidden);
    Linear second = layer(kept(weight2), s.element, vector(kept, "bias2", bias2, s.N), s.hidden, s.N);
    const Products products = products_of(s.element);
    const Units units(s);
    const int64_t bytes = size_of(s.element) * (s.C + 2 * s.hidden + s.N);
    const Matrix in = matrix(kept(x), s.C, s.element), hidden = matrix(fc1.mutable_data_ptr(), s.hidden, s.element);
    const Matrix out = matrix(y.mutable_data_ptr(), s.N, s.element);
    const auto gelu = [&](int64_t row, int64_t rows, const Matrix& act) {
        current_kernels().gelu({s.element, rows_from(hidden, row).data, act.data, nullptr, rows, s.hidden, act.pitch});
    };
    if (by_columns(kThreads, s.tokens, rows_in_l2(bytes))) {
        const Together together{products, kThreads};
        const Matrix act = units.at(chunk_memory.get(units.floats(s.tokens)));
        together.gemm(product(products, first, in, s.tokens, hidden));
        share_rows(kThreads, s.tokens, 4,
                   [&](int64_t begin, int64_t end) { gelu(begin, end - begin, rows_from(act, begin)); });
        together.gemm(product(products, second, act, s.tokens, out));
        return {y, fc1};
    }
    Linear* const layers[] = {&first, &second};
    pack(kThreads, products, layers, packed_memory);
    share_tokens(kThreads, s.tokens, rows_of_block_of(bytes), [&](int64_t row, int64_t rows) {
        const Matrix act = units.at(own_memory.get(units.floats(rows)));
        products.gemm(product(products, first, rows_from(in, row), rows, rows_from(hidden, row)));
        gelu(row, rows, act);
        products.gemm(product(products, second, act, rows, rows_from(out, row)));
    });
    return {y, fc1};
}

// The chunks of a backward pass.
class Backward {
  public:
    Backward(const Sizes& s, Matrix dy, Matrix x, Matrix fc1, Linear first, Linear second)
        : s_(s), dy_(dy), x_(x), fc1_(fc1), first_(first), second_(second) {
        Linear* const layers[] = {&first_, &second_};
        pack(kThreads, products_, layers, packed_memory);
        rows_ = rows_of_block_of(size_of(s.element) * (s.hidden + std::max(s.C, s.N)));
        chunk_ = std::max<int64_t>(1, kChunkUnits / s.hidden / kTokens) * kTokens;
        const Units units(s);
        const int64_t floats = units.floats(std::min(chunk_, s.tokens));
        float* memory = chunk_memory.get(2 * floats);
        act_ = units.at(memory);
        dfc1_ = units.at(memory + floats);
    }

    // Null for gradients that are not asked for.
    void run(void* dx, ParameterGradients& of_first, ParameterGradients& of_second) const {
        for (int64_t first = 0; first < s_.tokens; first += chunk_) {
            const int64_t tokens = std::min(chunk_, s_.tokens - first);
            hidden_units(first, tokens);
            gradients(first, tokens, rows_from(matrix(dx, s_.C, s_.element), first), of_first, of_second);
        }
    }

  private:
    void hidden_units(int64_t first, int64_t tokens) const {
        share_tokens(kThreads, tokens, rows_, [&](int64_t row, int64_t rows) {
            const Matrix act = rows_from(act_, row), dact = rows_from(dfc1_, row);
            products_.gemm(product(products_, second_, rows_from(dy_, first + row), rows, dact));
            current_kernels().gelu_backward(
                {s_.element, rows_from(fc1_, first + row).data, act.data, dact.data, rows, s_.hidden, act.pitch});
        });
    }

    void gradients(int64_t first, int64_t tokens, Matrix dx, ParameterGradients& of_first,
                   ParameterGradients& of_second) const {
        const GradientGrid one = grid(dfc1_, rows_from(x_, first), s_.hidden, s_.C, first, tokens, of_first);
        const GradientGrid two = grid(rows_from(dy_, first), act_, s_.N, s_.hidden, first, tokens, of_second);
        const int64_t of_one = of_first.weight() == nullptr ? 0 : one.tasks();
        const int64_t of_both = of_one + (of_second.weight() == nullptr ? 0 : two.tasks());
        const int64_t tasks = of_both + (dx.data == nullptr ? 0 : ceil_div(tokens, rows_));
        share_out(kThreads, tasks, [&](auto next) {
            for (int64_t i = next(); i < tasks; i = next()) {
                if (i < of_one) {
                    one.run(products_, i, own_memory);
                } else if (i < of_both) {
                    two.run(products_, i - of_one, own_memory);
                } else {
                    const int64_t row = (i - of_both) * rows_, rows = std::min(rows_, tokens - row);
                    products_.gemm(product(products_, first_, rows_from(dfc1_, row), rows, rows_from(dx, row)));
                }
            }
        });
    }

    GradientGrid grid(Matrix dy, Matrix x, int64_t N, int64_t K, int64_t first, int64_t tokens,
                      ParameterGradients& to) const {
        return {{dy.data, x.data, dy.pitch, x.pitch, N, K, tokens, to.weight(), K, to.bias(), first > 0, nullptr},
                s_.element,
                thread_count(kThreads)};
    }

    const Sizes s_;
    const Matrix dy_, x_, fc1_;
    Linear first_, second_;
    const Products products_ = products_of(s_.element);
    int64_t rows_, chunk_;
    Matrix act_{}, dfc1_{};
};

std::vector<Tensor> cpu_mlp_bwd(const Tensor& dy, const Tensor& x, const Tensor& fc1, const Tensor& weight1,
                                const Tensor& weight2, bool need_x, bool need_first, bool need_second) {
    const Sizes s(x, weight1, weight2);
    check_matrix("dy", dy, s.element, {s.tokens, s.N});
    check_matrix("fc1", fc1, s.element, {s.tokens, s.hidden});
    Kept kept;
    Tensor dx = need_x ? new_rows(x, s.tokens, s.C) : torch::stable::new_empty(x, Shape{0});
    ParameterGradients first(x, s.element, need_first ? s.hidden : 0, s.C);
    ParameterGradients second(x, s.element, need_second ? s.N : 0, s.hidden);
    Backward(s, matrix(kept(dy), s.N, s.element), matrix(kept(x), s.C, s.element),
             matrix(kept(fc1), s.hidden, s.element), layer(kept(weight1), s.element, nullptr, s.hidden, s.C, true),
             layer(kept(weight2), s.element, nullptr, s.N, s.hidden, true))
        .run(need_x ? dx.mutable_data_ptr() : nullptr, first, second);
    return {dx, first.of_weight(), first.of_bias(), second.of_weight(), second.of_bias()};
}

}  // namespace
}  // namespace focalnet::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(focalnet, m) {
    m.def("cpu_mlp_fwd(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2) -> Tensor[]");
    m.def(
        "cpu_mlp_bwd(Tensor dy, Tensor x, Tensor fc1, Tensor weight1, Tensor weight2, bool need_x, "
        "bool need_first, bool need_second) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(focalnet, CPU, m) {
    m.impl("cpu_mlp_fwd", TORCH_BOX(&focalnet::cpu::cpu_mlp_fwd));
    m.impl("cpu_mlp_bwd", TORCH_BOX(&focalnet::cpu::cpu_mlp_bwd));
}
