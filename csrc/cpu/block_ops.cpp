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

namespace focalnet::cpu {
namespace {

Norm norm(Kept& kept, const std::string& name, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
          double eps, bool post_norm, int64_t C) {
    STD_TORCH_CHECK(weight.has_value() == post_norm && bias.has_value() == post_norm, name, "_weight and ", name,
                    "_bias: expected all four of norm1's and norm2's (norms behind their branch) or none (norms "
                    "before it, folded into the next weights), got some");
    if (!post_norm) return {nullptr, nullptr, static_cast<float>(eps)};
    check_shape(name + "_weight", *weight, {C});
    check_shape(name + "_bias", *bias, {C});
    return {kept(*weight), kept(*bias), static_cast<float>(eps)};
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

Tensor cpu_block(const Tensor& hidden_state, const Tensor& projection_in, const Tensor& focal_weights,
                 std::vector<int64_t> focal_sizes, const Tensor& projection_context, const Tensor& projection_out,
                 const Tensor& fc1, const Tensor& fc2, std::optional<Tensor> norm1_weight,
                 std::optional<Tensor> norm1_bias, std::optional<Tensor> norm2_weight,
                 std::optional<Tensor> norm2_bias, double norm1_eps, double norm2_eps,
                 std::optional<double> modulation_eps, bool normalize_modulator) {
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

    b.projection_in = linear(kept, "projection_in", projection_in, b.C, 2 * b.C + b.L + 1);
    b.projection_context = linear(kept, "projection_context", projection_context, b.C, b.C);
    b.projection_out = linear(kept, "projection_out", projection_out, b.C, b.C);
    STD_TORCH_CHECK(fc2.dim() == 3 && fc2.size(1) >= 2, "fc2 (packed by cpu_pack_linear) has shape ",
                    text(shape_of(fc2)), "; expected three dimensions, the second 1 + hidden units");
    const int64_t hidden = fc2.size(1) - 1;
    b.fc1 = linear(kept, "fc1", fc1, b.C, hidden);
    b.fc2 = linear(kept, "fc2", fc2, hidden, b.C);
    b.post_norm = norm1_weight.has_value();
    b.norm1 = norm(kept, "norm1", norm1_weight, norm1_bias, norm1_eps, b.post_norm, b.C);
    b.norm2 = norm(kept, "norm2", norm2_weight, norm2_bias, norm2_eps, b.post_norm, b.C);
    b.norm_in_modulation = modulation_eps.has_value();
    b.modulation_eps = static_cast<float>(modulation_eps.value_or(0.0));
    b.normalize_modulator = normalize_modulator;

    Tensor result = torch::stable::new_empty(hidden_state, shape_of(hidden_state));
    b.result = static_cast<float*>(result.mutable_data_ptr());
    block(b);
    return result;
}

// One panel: the bias, then for every k the weights of kPanel outputs. Sums and products in double: folding rounds
// once.
void pack_panel(const float* weight, const float* bias, const float* column_scale, const float* column_shift,
                const float* row_scale, int64_t N, int64_t K, int64_t panel, float* packed) {
    std::fill(packed, packed + (K + 1) * kPanel, 0.0f);
    for (int64_t lane = 0; lane < std::min(kPanel, N - panel * kPanel); ++lane) {
        const int64_t n = panel * kPanel + lane;
        const double scale = row_scale == nullptr ? 1.0 : row_scale[n];
        double shift = bias == nullptr ? 0.0 : bias[n];
        for (int64_t k = 0; k < K; ++k) {
            const double w = weight[n * K + k];
            if (column_shift != nullptr) shift += w * column_shift[k];
            packed[(k + 1) * kPanel + lane] =
                static_cast<float>(scale * w * (column_scale == nullptr ? 1.0 : column_scale[k]));
        }
        packed[lane] = static_cast<float>(scale * shift);
    }
}

Tensor cpu_pack_linear(const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> column_scale,
                       std::optional<Tensor> column_shift, std::optional<Tensor> row_scale) {
    check_float("weight", weight);
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) >= 1, "weight has shape ",
                    text(shape_of(weight)), "; expected (N, K) with N and K of at least 1");
    const int64_t N = weight.size(0), K = weight.size(1), panels = (N + kPanel - 1) / kPanel;
    Kept kept;
    const auto vector = [&](const char* name, const std::optional<Tensor>& t, int64_t n) -> const float* {
        if (!t.has_value()) return nullptr;
        check_shape(name, *t, {n});
        return kept(*t);
    };
    const float* weights = kept(weight);
    const float* biases = vector("bias", bias, N);
    const float* column_scales = vector("column_scale", column_scale, K);
    const float* column_shifts = vector("column_shift", column_shift, K);
    const float* row_scales = vector("row_scale", row_scale, N);
    Tensor packed = torch::stable::new_empty(weight, Shape{panels, K + 1, kPanel});
    auto* to = static_cast<float*>(packed.mutable_data_ptr());
    // Weights stream through once a call: a page walk for every 4 KB would be in the way.
    prefer_huge_pages(to, panels * (K + 1) * kPanel * sizeof(float));
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p)
            pack_panel(weights, biases, column_scales, column_shifts, row_scales, N, K, p, to + p * (K + 1) * kPanel);
    });
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
        "cpu_block(Tensor hidden_state, Tensor projection_in, Tensor focal_weights, int[] focal_sizes, "
        "Tensor projection_context, Tensor projection_out, Tensor fc1, Tensor fc2, Tensor? norm1_weight, Tensor? "
        "norm1_bias, "
        "Tensor? norm2_weight, Tensor? norm2_bias, float norm1_eps, float norm2_eps, float? modulation_eps, "
        "bool normalize_modulator) -> Tensor");
    m.def(
        "cpu_pack_linear(Tensor weight, Tensor? bias, Tensor? column_scale, Tensor? column_shift, "
        "Tensor? row_scale) -> Tensor");
    m.def("cpu_pack_focal(Tensor[] focal_weights) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(focalnet, CPU, m) {
    m.impl("cpu_block", TORCH_BOX(&focalnet::cpu::cpu_block));
    m.impl("cpu_pack_linear", TORCH_BOX(&focalnet::cpu::cpu_pack_linear));
    m.impl("cpu_pack_focal", TORCH_BOX(&focalnet::cpu::cpu_pack_focal));
}
