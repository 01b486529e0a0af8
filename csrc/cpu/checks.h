// Argument checks of the operators of fused inference, in addition to arguments.h.

#pragma once

#include <string>
#include <vector>

#include "arguments.h"

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

}  // namespace focalnet::cpu
