// What the operators of fused inference check beyond arguments.h, and parameters as plain pointers.

#pragma once

#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "block.h"

namespace focalnet::cpu {

inline void check_float(const std::string& name, const Tensor& t) {
    check_cpu(name, t);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " has dtype ",
                    torch::headeronly::toString(t.scalar_type()), "; expected float32");
}

inline void check_shape(const std::string& name, const Tensor& t, const Shape& expected) {
    check_float(name, t);
    STD_TORCH_CHECK(shape_of(t) == expected, name, " has shape ", shape_text(t), "; expected ", text(expected));
}

inline const float* data(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// Keeps alive for the call what its plain pointers point to: contiguous parameters, and products of two.
class Kept {
  public:
    const float* operator()(const Tensor& t) {
        tensors_.push_back(torch::stable::contiguous(t));
        return data(tensors_.back());
    }

    // t * scale; a missing factor is `otherwise` everywhere.
    const float* scaled(const std::optional<Tensor>& t, const float* scale, int64_t n, float otherwise) {
        const float* values = t.has_value() ? (*this)(*t) : nullptr;
        std::vector<float>& product = vectors_.emplace_back(n, otherwise);
        for (int64_t i = 0; i < n; ++i) {
            if (values != nullptr) product[i] = values[i];
            if (scale != nullptr) product[i] *= scale[i];
        }
        return product.data();
    }

  private:
    std::vector<Tensor> tensors_;
    std::deque<std::vector<float>> vectors_;
};

inline const float* vector(Kept& kept, const std::string& name, const std::optional<Tensor>& t, int64_t n) {
    if (!t.has_value()) return nullptr;
    check_shape(name, *t, {n});
    return kept(*t);
}

// A LayerNorm over n channels, with or without weight and bias. `scale` multiplies what it gives.
inline Norm norm_over(Kept& kept, const std::string& name, const std::optional<Tensor>& weight,
                      const std::optional<Tensor>& bias, double eps, int64_t n, const float* scale = nullptr) {
    if (weight.has_value()) check_shape(name + "_weight", *weight, {n});
    if (bias.has_value()) check_shape(name + "_bias", *bias, {n});
    const auto e = static_cast<float>(eps);
    if (weight.has_value() && bias.has_value() && scale == nullptr) return {kept(*weight), kept(*bias), e};
    return {kept.scaled(weight, scale, n, 1.0f), kept.scaled(bias, scale, n, 0.0f), e};
}

}  // namespace focalnet::cpu
