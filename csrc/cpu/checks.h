// Argument checks that the operators of fused inference share.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

namespace focalnet::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline std::string text(const Shape& shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + ")";
}

inline Shape shape_of(const Tensor& t) {
    Shape shape;
    for (int64_t i = 0; i < t.dim(); ++i) shape.push_back(t.size(i));
    return shape;
}

inline void check_float(const std::string& name, const Tensor& t) {
    STD_TORCH_CHECK(t.is_cpu(), name, " is not on the CPU; expected a CPU tensor");
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " has dtype ",
                    torch::headeronly::toString(t.scalar_type()), "; expected float32");
}

inline void check_shape(const std::string& name, const Tensor& t, const Shape& expected) {
    check_float(name, t);
    STD_TORCH_CHECK(shape_of(t) == expected, name, " has shape ", text(shape_of(t)), "; expected ", text(expected));
}

}  // namespace focalnet::cpu
