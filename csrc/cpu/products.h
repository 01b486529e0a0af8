// Products of many rows, for training: each thread takes blocks of rows, and the activations are read in place.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>

#include "block.h"
#include "cache_sizes.h"
#include "checks.h"
#include "gemm_driver.h"
#include "isa.h"
#include "parameters.h"
#include "scratch.h"
#include "work_sharing.h"

namespace focalnet::cpu {

// Bytes of the rows that a thread reads and writes before it moves on: they share its L2 with the weights. For
// l2_share.
constexpr int64_t kRowBytes = 352 * 1024;

// The number of rows of `bytes` each that fit.
inline int64_t rows_in_l2(int64_t bytes) { return l2_share(kRowBytes) / bytes; }

// The most rows of a block whose rows take `bytes` each.
inline int64_t rows_of_block_of(int64_t bytes) { return rows_of_block(rows_in_l2(bytes)); }

// A tensor (rows, columns) on huge pages where it is large: fresh memory otherwise costs a fault for every 4 KB.
inline Tensor new_rows(const Tensor& like, int64_t rows, int64_t columns) {
    Tensor made = torch::stable::new_empty(like, Shape{rows, columns});
    prefer_huge_pages(made.mutable_data_ptr(), rows * columns * size_of(element_of("tensor", like)));
    return made;
}

inline Matrix matrix(const void* data, int64_t pitch, Element element) {
    return {const_cast<void*>(data), pitch, element};
}

// The element of a training operator's tensors.
inline Element trained_element(const std::string& name, const Tensor& t) {
    const Element element = element_of(name, t);
    STD_TORCH_CHECK(products_of(element).a == element, name,
                    " has dtype bfloat16, and this processor has no dot products of it; expected float32");
    return element;
}

inline void check_matrix(const std::string& name, const Tensor& t, Element element, const Shape& expected) {
    STD_TORCH_CHECK(element_of(name, t) == element, name, " has dtype ", torch::headeronly::toString(t.scalar_type()),
                    "; expected that of the other tensors, ", torch::headeronly::toString(dtype_of(element)));
    STD_TORCH_CHECK(shape_of(t) == expected, name, " has shape ", text(shape_of(t)), "; expected ", text(expected));
}

// The gradients of a layer's weight (N, K) and bias (N): sums in float32, rounded when they are complete. With N = 0
// they are empty.
class ParameterGradients {
  public:
    ParameterGradients(const Tensor& rows, Element element, int64_t N, int64_t K) : element_(element), N_(N), K_(K) {
        // Without rows nothing would be written.
        const auto make = [&](const Shape& shape) {
            return rows.size(0) == 0 ? torch::stable::new_zeros(rows, shape, ScalarType::Float)
                                     : torch::stable::new_empty(rows, shape, ScalarType::Float);
        };
        weight_ = make(N == 0 ? Shape{0} : Shape{N, K});
        bias_ = make(Shape{N});
    }

    // Null if they are empty.
    float* weight() { return N_ == 0 ? nullptr : static_cast<float*>(weight_->mutable_data_ptr()); }
    float* bias() { return N_ == 0 ? nullptr : static_cast<float*>(bias_->mutable_data_ptr()); }

    Tensor of_weight() { return rounded(*weight_, N_, K_); }
    Tensor of_bias() { return rounded(*bias_, N_ == 0 ? 0 : 1, N_); }

  private:
    Tensor rounded(const Tensor& sums, int64_t rows, int64_t columns) const {
        if (element_ == Element::kFloat32) return sums;
        Tensor made = torch::stable::new_empty(sums, shape_of(sums), dtype_of(element_));
        const Matrix from = matrix(sums.const_data_ptr(), columns, Element::kFloat32);
        const Matrix to = matrix(made.mutable_data_ptr(), columns, element_);
        Together{products_of(element_), Threads::kTorch}.rows(
            {from, {}, to, rows, columns, false, 0.0f, nullptr, nullptr});
        return made;
    }

    Element element_;
    int64_t N_, K_;
    std::optional<Tensor> weight_, bias_;
};

// A range of a weight gradient that one thread computes. Both operands are packed once for each range, so small ranges
// cost time, and large ones do not fit into L2.
constexpr int64_t kMostGradientRows = 192, kMostGradientColumns = 256;

// A weight gradient as tasks for threads: a grid of row ranges and column ranges.
class GradientGrid {
  public:
    GradientGrid(const WeightGradientTask& whole, Element element, int64_t threads)
        : whole_(whole),
          element_(element),
          down_(ceil_div(whole.N, kMostGradientRows)),
          across_(ceil_div(whole.K, kMostGradientColumns)) {
        // Split the longer side until every thread has work.
        while (down_ * across_ < threads && (height() > kPanel || width() > kPanel))
            (height() >= width() ? down_ : across_) *= 2;
    }

    int64_t tasks() const { return down_ * across_; }

    void run(const Products& products, int64_t task, Memory& memory) const {
        WeightGradientTask part = whole_;
        const int64_t n = task / across_ * height(), k = task % across_ * width();
        part.N = std::min(height(), whole_.N - n);
        part.K = std::min(width(), whole_.K - k);
        if (part.N <= 0 || part.K <= 0) return;
        part.dy = static_cast<const char*>(part.dy) + n * size_of(element_);
        part.x = static_cast<const char*>(part.x) + k * size_of(element_);
        part.dw += n * part.dw_pitch + k;
        part.sums = part.sums == nullptr || k > 0 ? nullptr : part.sums + n;
        part.scratch = memory.get(weight_gradient_floats(part.N, part.K));
        products.weight_gradient(part);
    }

  private:
    int64_t height() const { return round_up(ceil_div(whole_.N, down_), 2 * kRowUnit); }
    int64_t width() const { return round_up(ceil_div(whole_.K, across_), kPanel); }

    WeightGradientTask whole_;
    Element element_;
    int64_t down_, across_;
};

}  // namespace focalnet::cpu
