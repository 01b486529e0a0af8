// The operator focalnet::cpu_block: checks the arguments and turns tensors into plain pointers. The arithmetic is in
// block.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <vector>

#include "block.h"
#include "checks.h"
#include "gated_aggregation.h"
#include "parameters.h"

namespace focalnet::cpu {
namespace {

// A linear layer or a 1x1 convolution.
Linear linear(Kept& kept, const std::string& name, const Tensor& weight, Weights as, const std::optional<Tensor>& bias,
              int64_t K, int64_t N, const float* scale = nullptr) {
    const Element element = as.of(name, weight);
    const Shape expected = weight.dim() == 4 ? Shape{N, K, 1, 1} : Shape{N, K};
    STD_TORCH_CHECK(shape_of(weight) == expected, name, " has shape ", text(shape_of(weight)), "; expected ",
                    text(expected));
    return {kept(weight), element, vector(kept, name + "_bias", bias, N), scale, K, N};
}

int64_t hidden_units(const Tensor& fc2) {
    STD_TORCH_CHECK(fc2.dim() >= 2 && fc2.size(1) >= 1, "fc2 has shape ", text(shape_of(fc2)),
                    "; expected (C, hidden units)");
    return fc2.size(1);
}

std::vector<FocalWeight> levels_of(Kept& kept, const std::vector<Tensor>& focal_weights, Weights as, int64_t C) {
    std::vector<FocalWeight> levels;
    for (size_t l = 0; l < focal_weights.size(); ++l) {
        const Tensor& w = focal_weights[l];
        const std::string name = "focal_weights[" + std::to_string(l) + "]";
        as.of(name, w);
        STD_TORCH_CHECK(w.dim() == 4 && w.size(0) == C && w.size(1) == 1 && w.size(2) % 2 == 1 && w.size(3) % 2 == 1,
                        name, " has shape ", text(shape_of(w)), "; expected (", C, ", 1, kh, kw) with odd kh and kw");
        levels.push_back({as.rounded ? kept.halves(name, w) : kept(w), w.size(2), w.size(3)});
    }
    return levels;
}

Tensor cpu_block(const Tensor& hidden_state, const Tensor& projection_in, std::optional<Tensor> projection_in_bias,
                 std::vector<Tensor> focal_weights, const Tensor& projection_context,
                 std::optional<Tensor> projection_context_bias, const Tensor& projection_out,
                 std::optional<Tensor> projection_out_bias, const Tensor& fc1, std::optional<Tensor> fc1_bias,
                 const Tensor& fc2, std::optional<Tensor> fc2_bias, std::optional<Tensor> norm1_weight,
                 std::optional<Tensor> norm1_bias, double norm1_eps, std::optional<Tensor> norm2_weight,
                 std::optional<Tensor> norm2_bias, double norm2_eps, std::optional<Tensor> modulation_norm_weight,
                 std::optional<Tensor> modulation_norm_bias, std::optional<double> modulation_norm_eps,
                 std::optional<Tensor> gamma_1, std::optional<Tensor> gamma_2, bool post_norm,
                 bool normalize_modulator, bool own_threads, bool rounded_weights) {
    const Weights as = Weights::like("projection_in", projection_in, rounded_weights);
    const Element element = as.element;
    const Element given = map_element("hidden_state", hidden_state, element);
    check_map_shape("hidden_state", hidden_state);
    Kept kept;
    Block b{};
    b.B = hidden_state.size(0);
    b.H = hidden_state.size(1);
    b.W = hidden_state.size(2);
    b.C = hidden_state.size(3);
    b.element = element;
    b.hidden_state = {const_cast<void*>(kept(hidden_state)), b.C, given};

    STD_TORCH_CHECK(!focal_weights.empty(), "focal_weights is empty; expected at least one level");
    const int64_t L = static_cast<int64_t>(focal_weights.size()), hidden = hidden_units(fc2);
    b.projection_in = linear(kept, "projection_in", projection_in, as, projection_in_bias, b.C, 2 * b.C + L + 1);
    const std::vector<FocalWeight> levels = levels_of(kept, focal_weights, as, b.C);
    b.L = L;
    b.focal_weights = levels.data();
    // A layer scale is folded into what precedes it: the norm in a post-norm block, otherwise the last product of the
    // branch.
    const float* scale_1 = vector(kept, "gamma_1", gamma_1, b.C);
    const float* scale_2 = vector(kept, "gamma_2", gamma_2, b.C);
    const auto of_product = [post_norm](const float* scale) { return post_norm ? nullptr : scale; };
    const auto of_norm = [post_norm](const float* scale) { return post_norm ? scale : nullptr; };
    b.projection_context =
        linear(kept, "projection_context", projection_context, as, projection_context_bias, b.C, b.C);
    b.projection_out =
        linear(kept, "projection_out", projection_out, as, projection_out_bias, b.C, b.C, of_product(scale_1));
    b.fc1 = linear(kept, "fc1", fc1, as, fc1_bias, b.C, hidden);
    b.fc2 = linear(kept, "fc2", fc2, as, fc2_bias, hidden, b.C, of_product(scale_2));
    b.post_norm = post_norm;
    b.norm1 = norm_over(kept, "norm1", norm1_weight, norm1_bias, norm1_eps, b.C, of_norm(scale_1));
    b.norm2 = norm_over(kept, "norm2", norm2_weight, norm2_bias, norm2_eps, b.C, of_norm(scale_2));
    b.norm_in_modulation = modulation_norm_eps.has_value();
    if (b.norm_in_modulation)
        b.modulation_norm = norm_over(kept, "modulation_norm", modulation_norm_weight, modulation_norm_bias,
                                      *modulation_norm_eps, b.C);
    b.normalize_modulator = normalize_modulator;
    b.threads = own_threads ? Threads::kOwn : Threads::kTorch;

    // As in PyTorch: a branch scaled by a float32 layer scale is float32, and so is its sum with the residual.
    const auto is_float = [](const std::optional<Tensor>& scale) {
        return scale.has_value() && scale->scalar_type() == ScalarType::Float;
    };
    const Element wanted = is_float(gamma_1) || is_float(gamma_2) ? Element::kFloat32 : given;
    Tensor result = torch::stable::new_empty(hidden_state, shape_of(hidden_state), dtype_of(wanted));
    b.result = {result.mutable_data_ptr(), b.C, wanted};
    block(b);
    return result;
}

}  // namespace
}  // namespace focalnet::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(focalnet, m) {
    m.def(
        "cpu_block(Tensor hidden_state, Tensor projection_in, Tensor? projection_in_bias, Tensor[] focal_weights, "
        "Tensor projection_context, Tensor? projection_context_bias, Tensor projection_out, "
        "Tensor? projection_out_bias, Tensor fc1, Tensor? fc1_bias, Tensor fc2, Tensor? fc2_bias, "
        "Tensor? norm1_weight, Tensor? norm1_bias, float norm1_eps, Tensor? norm2_weight, Tensor? norm2_bias, "
        "float norm2_eps, Tensor? modulation_norm_weight, Tensor? modulation_norm_bias, float? modulation_norm_eps, "
        "Tensor? gamma_1, Tensor? gamma_2, bool post_norm, bool normalize_modulator, "
        "bool own_threads=False, bool rounded_weights=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(focalnet, CPU, m) { m.impl("cpu_block", TORCH_BOX(&focalnet::cpu::cpu_block)); }
