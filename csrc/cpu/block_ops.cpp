// The operators focalnet::cpu_block, cpu_pack_linear and cpu_pack_focal: argument checks, tensors turned into plain
// pointers. The arithmetic is in block.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "block.h"
#include "checks.h"
#include "gated_aggregation.h"
#include "isa.h"
#include "memory.h"
#include "product.h"

namespace focalnet::cpu {
namespace {

Norm norm(Kept& kept, const std::string& name, const Tensor& weight, const Tensor& bias, double eps, int64_t C) {
    check_shape(name + "_weight", weight, {C});
    check_shape(name + "_bias", bias, {C});
    return {kept(weight), kept(bias), static_cast<float>(eps)};
}

const float* vector(Kept& kept, const std::string& name, const std::optional<Tensor>& t, int64_t n) {
    if (!t.has_value()) return nullptr;
    check_shape(name, *t, {n});
    return kept(*t);
}

// Packed (three dimensions, with bias and scale inside), or as the module has it.
Linear linear(Kept& kept, const std::string& name, const Tensor& weight, const std::optional<Tensor>& bias, int64_t K,
              int64_t N, const std::string& scale_name = "", const std::optional<Tensor>& scale = {}) {
    if (weight.dim() == 3) return packed_linear(kept, name, weight, K, N);
    check_shape(name, weight, {N, K});
    return {kept(weight), vector(kept, name + "_bias", bias, N), vector(kept, scale_name, scale, N), nullptr, K, N};
}

int64_t hidden_units(const Tensor& fc2) {
    const bool packed = fc2.dim() == 3;
    STD_TORCH_CHECK((packed || fc2.dim() == 2) && fc2.size(1) >= 1 + packed, "fc2 has shape ", text(shape_of(fc2)),
                    "; expected (C, hidden units), or what cpu_pack_linear makes of it");
    return fc2.size(1) - packed;
}

// Sizes (kh, kw) of the levels, one after the other.
std::vector<FocalWeight> levels_of(const std::vector<int64_t>& sizes) {
    STD_TORCH_CHECK(!sizes.empty() && sizes.size() % 2 == 0, "focal_sizes has ", sizes.size(),
                    " values; expected kh and kw of every level, at least one");
    std::vector<FocalWeight> levels;
    for (size_t i = 0; i < sizes.size(); i += 2) {
        STD_TORCH_CHECK(sizes[i] > 0 && sizes[i] % 2 == 1 && sizes[i + 1] > 0 && sizes[i + 1] % 2 == 1,
                        "focal_sizes has ", sizes[i], " x ", sizes[i + 1], "; expected odd kh and kw");
        levels.push_back({nullptr, sizes[i], sizes[i + 1]});
    }
    return levels;
}

Shape packed_focal_shape(int64_t C, const std::vector<FocalWeight>& levels, int64_t lanes) {
    int64_t taps = 0;
    for (const FocalWeight& level : levels) taps += level.kh * level.kw;
    return {(C + kBlock - 1) / kBlock * (kBlock / lanes), taps, lanes};
}

Tensor cpu_block(const Tensor& hidden_state, const Tensor& projection_in, std::optional<Tensor> projection_in_bias,
                 const Tensor& focal_weights, std::vector<int64_t> focal_sizes, const Tensor& projection_context,
                 std::optional<Tensor> projection_context_bias, const Tensor& projection_out,
                 std::optional<Tensor> projection_out_bias, const Tensor& fc1, std::optional<Tensor> fc1_bias,
                 const Tensor& fc2, std::optional<Tensor> fc2_bias, const Tensor& norm1_weight,
                 const Tensor& norm1_bias, double norm1_eps, const Tensor& norm2_weight, const Tensor& norm2_bias,
                 double norm2_eps, std::optional<Tensor> modulation_norm_weight,
                 std::optional<Tensor> modulation_norm_bias, std::optional<double> modulation_norm_eps,
                 std::optional<Tensor> scale_1, std::optional<Tensor> scale_2, bool post_norm,
                 bool normalize_modulator) {
    check_float("hidden_state", hidden_state);
    STD_TORCH_CHECK(
        hidden_state.dim() == 4 && hidden_state.size(1) >= 1 && hidden_state.size(2) >= 1 && hidden_state.size(3) >= 1,
        "hidden_state has shape ", text(shape_of(hidden_state)),
        "; expected (B, H, W, C) with H, W and C of at least 1");
    Kept kept;
    Block b{};
    b.B = hidden_state.size(0);
    b.H = hidden_state.size(1);
    b.W = hidden_state.size(2);
    b.C = hidden_state.size(3);
    b.hidden_state = kept(hidden_state);

    const std::vector<FocalWeight> levels = levels_of(focal_sizes);
    b.L = static_cast<int64_t>(levels.size());
    b.focal_weights = levels.data();
    check_shape("focal_weights (packed by cpu_pack_focal)", focal_weights,
                packed_focal_shape(b.C, levels, current_kernels().lanes));
    b.packed_focal_weights = kept(focal_weights);

    const int64_t hidden = hidden_units(fc2);
    b.projection_in = linear(kept, "projection_in", projection_in, projection_in_bias, b.C, 2 * b.C + b.L + 1);
    b.projection_context = linear(kept, "projection_context", projection_context, projection_context_bias, b.C, b.C);
    b.projection_out =
        linear(kept, "projection_out", projection_out, projection_out_bias, b.C, b.C, "scale_1", scale_1);
    b.fc1 = linear(kept, "fc1", fc1, fc1_bias, b.C, hidden);
    b.fc2 = linear(kept, "fc2", fc2, fc2_bias, hidden, b.C, "scale_2", scale_2);
    b.post_norm = post_norm;
    b.norm1 = norm(kept, "norm1", norm1_weight, norm1_bias, norm1_eps, b.C);
    b.norm2 = norm(kept, "norm2", norm2_weight, norm2_bias, norm2_eps, b.C);
    b.norm_in_modulation = modulation_norm_eps.has_value();
    STD_TORCH_CHECK(modulation_norm_weight.has_value() == b.norm_in_modulation &&
                        modulation_norm_bias.has_value() == b.norm_in_modulation,
                    "modulation_norm_weight, modulation_norm_bias, modulation_norm_eps: expected all three (a "
                    "LayerNorm) or none, got some");
    if (b.norm_in_modulation)
        b.modulation_norm =
            norm(kept, "modulation_norm", *modulation_norm_weight, *modulation_norm_bias, *modulation_norm_eps, b.C);
    b.normalize_modulator = normalize_modulator;

    Tensor result = torch::stable::new_empty(hidden_state, shape_of(hidden_state));
    b.result = static_cast<float*>(result.mutable_data_ptr());
    block(b);
    return result;
}

Tensor cpu_pack_linear(const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> scale) {
    check_float("weight", weight);
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) >= 1, "weight has shape ",
                    text(shape_of(weight)), "; expected (N, K) with N and K of at least 1");
    const int64_t N = weight.size(0), K = weight.size(1);
    Kept kept;
    const Linear layer{kept(weight), vector(kept, "bias", bias, N), vector(kept, "scale", scale, N), nullptr, K, N};
    Tensor packed = torch::stable::new_empty(weight, Shape{ceil_div(N, kPanel), K + 1, kPanel});
    auto* to = static_cast<float*>(packed.mutable_data_ptr());
    // Weights stream through once a call: a page walk for every 4 KB would be in the way.
    prefer_huge_pages(to, packed_floats(layer) * sizeof(float));
    pack(current_kernels(), layer, to);
    return packed;
}

Tensor cpu_pack_focal(std::vector<Tensor> focal_weights) {
    STD_TORCH_CHECK(!focal_weights.empty(), "focal_weights is empty; expected at least one level");
    const int64_t C = focal_weights[0].dim() == 4 ? focal_weights[0].size(0) : 0;
    Kept kept;
    std::vector<FocalWeight> levels;
    for (size_t l = 0; l < focal_weights.size(); ++l) {
        const Tensor& w = focal_weights[l];
        const std::string name = "focal_weights[" + std::to_string(l) + "]";
        check_float(name, w);
        STD_TORCH_CHECK(
            C >= 1 && w.dim() == 4 && w.size(0) == C && w.size(1) == 1 && w.size(2) % 2 == 1 && w.size(3) % 2 == 1,
            name, " has shape ", text(shape_of(w)), "; expected (", C < 1 ? "C" : std::to_string(C),
            ", 1, kh, kw) with odd kh and kw");
        levels.push_back({kept(w), w.size(2), w.size(3)});
    }
    Problem problem{};
    problem.C = C;
    problem.L = static_cast<int64_t>(levels.size());
    problem.weights = levels.data();
    Tensor packed = torch::stable::new_empty(focal_weights[0], packed_focal_shape(C, levels, current_kernels().lanes));
    pack_focal_weights(problem, static_cast<float*>(packed.mutable_data_ptr()));
    return packed;
}

}  // namespace
}  // namespace focalnet::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(focalnet, m) {
    m.def(
        "cpu_block(Tensor hidden_state, Tensor projection_in, Tensor? projection_in_bias, Tensor focal_weights, "
        "int[] focal_sizes, Tensor projection_context, Tensor? projection_context_bias, Tensor projection_out, "
        "Tensor? projection_out_bias, Tensor fc1, Tensor? fc1_bias, Tensor fc2, Tensor? fc2_bias, "
        "Tensor norm1_weight, Tensor norm1_bias, float norm1_eps, Tensor norm2_weight, Tensor norm2_bias, "
        "float norm2_eps, Tensor? modulation_norm_weight, Tensor? modulation_norm_bias, float? modulation_norm_eps, "
        "Tensor? scale_1, Tensor? scale_2, bool post_norm, bool normalize_modulator) -> Tensor");
    m.def("cpu_pack_linear(Tensor weight, Tensor? bias, Tensor? scale) -> Tensor");
    m.def("cpu_pack_focal(Tensor[] focal_weights) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(focalnet, CPU, m) {
    m.impl("cpu_block", TORCH_BOX(&focalnet::cpu::cpu_block));
    m.impl("cpu_pack_linear", TORCH_BOX(&focalnet::cpu::cpu_pack_linear));
    m.impl("cpu_pack_focal", TORCH_BOX(&focalnet::cpu::cpu_pack_focal));
}
