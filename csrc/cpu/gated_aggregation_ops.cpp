// The operators focalnet::cpu_gated_aggregation, cpu_gated_aggregation_and_sums and cpu_gated_aggregation_bwd. They
// check the arguments, turn views into plain pointers and strides, and allocate the results. The arithmetic is in
// gated_aggregation.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "gated_aggregation.h"

namespace focalnet::cpu {
namespace {

Map map_of(const Tensor& t) { return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)}; }

Map output_map_of(const Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// A problem, with the tensors and arrays that its pointers refer to.
struct Arguments {
    Tensor ctx, gates;
    std::vector<Tensor> weights;
    std::vector<FocalWeight> weight_views;
    Problem problem;
};

Arguments parse(const Tensor& ctx, const Tensor& gates, const std::vector<Tensor>& focal_weights, bool normalize) {
    STD_TORCH_CHECK(ctx.scalar_type() == ScalarType::Float || ctx.scalar_type() == ScalarType::BFloat16,
                    "ctx has dtype ", torch::headeronly::toString(ctx.scalar_type()),
                    "; expected float32 or bfloat16");
    const auto levels = static_cast<int64_t>(focal_weights.size());
    check_ctx_and_gates(ctx, gates, levels);
    Arguments args{with_unit_channel_stride(ctx), with_unit_channel_stride(gates), {}, {}, {}};
    for (size_t l = 0; l < focal_weights.size(); ++l) {
        check_focal_weight(l, focal_weights[l], ctx);
        args.weights.push_back(torch::stable::contiguous(focal_weights[l]));
        const Tensor& w = args.weights.back();
        args.weight_views.push_back({w.const_data_ptr(), w.size(2), w.size(3)});
    }
    const Element element = ctx.scalar_type() == ScalarType::Float ? Element::kFloat32 : Element::kBFloat16;
    args.problem = {element,
                    ctx.size(0),
                    ctx.size(1),
                    ctx.size(2),
                    ctx.size(3),
                    levels,
                    map_of(args.ctx),
                    map_of(args.gates),
                    args.weight_views.data(),
                    normalize ? 1.0f / static_cast<float>(levels + 1) : 1.0f};
    return args;
}

Tensor cpu_gated_aggregation(const Tensor& ctx, const Tensor& gates, std::vector<Tensor> focal_weights,
                             bool normalize_modulator) {
    const Arguments args = parse(ctx, gates, focal_weights, normalize_modulator);
    Tensor agg = torch::stable::new_empty(ctx, shape_of(ctx));
    gated_aggregation(args.problem, output_map_of(agg));
    return agg;
}

// Returns agg, and the sums of the last level over the map, (B, C) in float32.
std::vector<Tensor> cpu_gated_aggregation_and_sums(const Tensor& ctx, const Tensor& gates,
                                                   std::vector<Tensor> focal_weights, bool normalize_modulator) {
    const Arguments args = parse(ctx, gates, focal_weights, normalize_modulator);
    Tensor agg = torch::stable::new_empty(ctx, shape_of(ctx));
    Tensor sums = torch::stable::new_empty(ctx, {ctx.size(0), ctx.size(3)}, ScalarType::Float);
    gated_aggregation(args.problem, output_map_of(agg), static_cast<float*>(sums.mutable_data_ptr()));
    return {agg, sums};
}

const float* sums_of(const std::optional<Tensor>& sums, const Tensor& ctx) {
    if (!sums) return nullptr;
    STD_TORCH_CHECK(sums->is_cpu() && sums->scalar_type() == ScalarType::Float && sums->is_contiguous() &&
                        sums->dim() == 2 && sums->size(0) == ctx.size(0) && sums->size(1) == ctx.size(3),
                    "sums is no contiguous float32 matrix of shape (", ctx.size(0), ", ", ctx.size(3), ")");
    return static_cast<const float*>(sums->const_data_ptr());
}

std::vector<Tensor> cpu_gated_aggregation_bwd(const Tensor& dagg, const Tensor& ctx, const Tensor& gates,
                                              std::vector<Tensor> focal_weights, bool normalize_modulator,
                                              std::vector<bool> output_mask, std::optional<Tensor> sums) {
    const Arguments args = parse(ctx, gates, focal_weights, normalize_modulator);
    check_dagg(dagg, ctx);
    STD_TORCH_CHECK(output_mask.size() == 3, "output_mask has ", output_mask.size(),
                    " entries; expected three: ctx, gates, focal_weights");
    const Tensor dagg_view = with_unit_channel_stride(dagg);
    std::vector<Tensor> grads{empty_like_if(ctx, output_mask[0]), empty_like_if(gates, output_mask[1])};
    for (const Tensor& w : args.weights) grads.push_back(empty_like_if(w, output_mask[2]));

    std::vector<void*> dweights;
    for (size_t l = 0; l < args.weights.size(); ++l) dweights.push_back(grads[2 + l].mutable_data_ptr());
    Gradients out{};
    out.want_ctx = output_mask[0];
    out.want_gates = output_mask[1];
    out.want_weights = output_mask[2];
    if (out.want_ctx) out.dctx = output_map_of(grads[0]);
    if (out.want_gates) out.dgates = output_map_of(grads[1]);
    out.dweights = dweights.data();
    if (out.want_ctx || out.want_gates || out.want_weights)
        gated_aggregation_backward(args.problem, map_of(dagg_view), sums_of(sums, ctx), out);
    return grads;
}

}  // namespace
}  // namespace focalnet::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(focalnet, m) {
    m.def(
        "cpu_gated_aggregation(Tensor ctx, Tensor gates, Tensor[] focal_weights, bool normalize_modulator) -> Tensor");
    m.def(
        "cpu_gated_aggregation_and_sums(Tensor ctx, Tensor gates, Tensor[] focal_weights, bool normalize_modulator) "
        "-> Tensor[]");
    m.def(
        "cpu_gated_aggregation_bwd(Tensor dagg, Tensor ctx, Tensor gates, Tensor[] focal_weights, "
        "bool normalize_modulator, bool[] output_mask, Tensor? sums=None) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(focalnet, CPU, m) {
    m.impl("cpu_gated_aggregation", TORCH_BOX(&focalnet::cpu::cpu_gated_aggregation));
    m.impl("cpu_gated_aggregation_and_sums", TORCH_BOX(&focalnet::cpu::cpu_gated_aggregation_and_sums));
    m.impl("cpu_gated_aggregation_bwd", TORCH_BOX(&focalnet::cpu::cpu_gated_aggregation_bwd));
}
