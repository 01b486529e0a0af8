// Parameters as plain pointers, for the operators of fused inference. Weights of linear layers stay in float32 or
// bfloat16. Vectors (biases, norms, scales) become float32.

#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <bit>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "block.h"
#include "checks.h"

namespace focalnet::cpu {

using BF16 = torch::headeronly::BFloat16;

inline Element element_of(const std::string& name, const Tensor& t) {
    STD_TORCH_CHECK(t.is_cpu(), name, " is not on the CPU; expected a CPU tensor");
    if (t.scalar_type() == ScalarType::BFloat16) return Element::kBFloat16;
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " has dtype ",
                    torch::headeronly::toString(t.scalar_type()), "; expected float32 or bfloat16");
    return Element::kFloat32;
}

inline ScalarType dtype_of(Element element) {
    return element == Element::kBFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
}

// How a call reads its weights: all have one element. With `rounded`, float32 weights are read as bfloat16, as under
// autocast.
struct Weights {
    Element element;  // of the products
    bool rounded;

    // As `first`, one of the weights, is read.
    static Weights like(const std::string& name, const Tensor& first, bool rounded) {
        return {rounded ? Element::kBFloat16 : element_of(name, first), rounded};
    }

    // The element as which products read t.
    Element of(const std::string& name, const Tensor& t) const {
        const Element found = element_of(name, t);
        if (rounded) return found == Element::kBFloat16 ? found : Element::kRounded;
        STD_TORCH_CHECK(found == element, name, " has dtype ", torch::headeronly::toString(t.scalar_type()),
                        "; expected that of the other weights, ", torch::headeronly::toString(dtype_of(element)));
        return found;
    }
};

inline void check_map_shape(const std::string& name, const Tensor& map) {
    STD_TORCH_CHECK(map.dim() == 4 && map.size(1) >= 1 && map.size(2) >= 1 && map.size(3) >= 1, name, " has shape ",
                    text(shape_of(map)), "; expected (B, H, W, C) with H, W and C of at least 1");
}

// Float32 maps may come with bfloat16 weights, as under autocast. There are no products of the reverse.
inline Element map_element(const std::string& name, const Tensor& map, Element weights) {
    const Element element = element_of(name, map);
    STD_TORCH_CHECK(element == Element::kFloat32 || weights == Element::kBFloat16, name,
                    " has dtype bfloat16 and the weights float32; expected float32, or weights in bfloat16");
    return element;
}

// Owns the data that a call's plain pointers refer to: contiguous parameters, and vectors converted from them.
class Kept {
  public:
    const void* operator()(const Tensor& t) {
        tensors_.push_back(torch::stable::contiguous(t));
        return tensors_.back().const_data_ptr();
    }

    // The values of t in float32.
    const float* floats(const std::string& name, const Tensor& t) {
        const void* data = (*this)(t);
        if (element_of(name, t) == Element::kFloat32) return static_cast<const float*>(data);
        const uint16_t* halves = static_cast<const uint16_t*>(data);
        std::vector<float>& values = vectors_.emplace_back(t.numel());
        for (size_t i = 0; i < values.size(); ++i)
            values[i] = std::bit_cast<float>(static_cast<uint32_t>(halves[i]) << 16);
        return values.data();
    }

    // The values of t rounded to bfloat16.
    const void* halves(const std::string& name, const Tensor& t) {
        const void* data = (*this)(t);
        if (element_of(name, t) == Element::kBFloat16) return data;
        const float* values = static_cast<const float*>(data);
        std::vector<BF16>& rounded = halves_.emplace_back(t.numel());
        for (size_t i = 0; i < rounded.size(); ++i) rounded[i] = static_cast<BF16>(values[i]);
        return rounded.data();
    }

    // values * scale. If values is null, `otherwise` replaces every value. If scale is null, it counts as 1.
    const float* scaled(const float* values, const float* scale, int64_t n, float otherwise) {
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
    std::deque<std::vector<BF16>> halves_;
};

inline const float* vector(Kept& kept, const std::string& name, const std::optional<Tensor>& t, int64_t n) {
    if (!t.has_value()) return nullptr;
    element_of(name, *t);
    STD_TORCH_CHECK(shape_of(*t) == Shape{n}, name, " has shape ", text(shape_of(*t)), "; expected ", text({n}));
    return kept.floats(name, *t);
}

// A LayerNorm over n channels, with or without weight and bias. `scale`, if not null, multiplies its output.
inline Norm norm_over(Kept& kept, const std::string& name, const std::optional<Tensor>& weight,
                      const std::optional<Tensor>& bias, double eps, int64_t n, const float* scale = nullptr) {
    const float* weights = vector(kept, name + "_weight", weight, n);
    const float* biases = vector(kept, name + "_bias", bias, n);
    const auto e = static_cast<float>(eps);
    if (weights != nullptr && biases != nullptr && scale == nullptr) return {weights, biases, e};
    return {kept.scaled(weights, scale, n, 1.0f), kept.scaled(biases, scale, n, 0.0f), e};
}

}  // namespace focalnet::cpu
