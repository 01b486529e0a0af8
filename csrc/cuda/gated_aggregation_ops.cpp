// The operators focalnet::cuda_gated_aggregation and focalnet::cuda_gated_aggregation_bwd: argument checks, views
// turned into plain pointers and strides, results and scratch from torch's allocator, the device and the stream. The
// kernels are in gated_aggregation_fwd.cu and gated_aggregation_bwd.cu.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "gated_aggregation.h"
#include "operator.h"
#include "stream.h"
#include "toeplitz.h"

namespace focalnet::cuda {
namespace {

Map map_of(const Tensor& t) { return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)}; }

Map output_map_of(const Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// Owns what the pointers of `problem` point to.
struct Arguments {
    Tensor ctx, gates;
    std::vector<Tensor> weights;
    Problem problem;
};

// focalnet/backends/cuda.py decides for tensor cores (why_not_tensor_cores); here its decision is held to the limits.
void check_tensor_cores(const Problem& p) {
    int reach_y = 0, reach_x = 0, largest = 0;
    for (int l = 0; l < p.L; ++l) {
        reach_y += p.weights[l].kh / 2;
        reach_x += p.weights[l].kw / 2;
        largest = std::max({largest, p.weights[l].kh, p.weights[l].kw});
    }
    STD_TORCH_CHECK(p.element != Element::kFloat32, "tensor_cores is True and ctx is float32; expected a 16-bit type");
    STD_TORCH_CHECK(largest <= kMaxToeplitzKernel, "tensor_cores is True and a focal kernel is ", largest,
                    " wide; expected at most ", kMaxToeplitzKernel);
    STD_TORCH_CHECK(std::max(reach_y, reach_x) <= kMaxToeplitzReach,
                    "tensor_cores is True and the focal levels reach ", std::max(reach_y, reach_x),
                    " positions; expected at most ", kMaxToeplitzReach);
}

// All that a plan depends on.
Problem sizes_of(const Tensor& ctx, const std::vector<Tensor>& focal_weights, bool tensor_cores) {
    const auto levels = static_cast<int64_t>(focal_weights.size());
    // A position's number within its image is an int in the kernels; offsets into the tensors are not.
    STD_TORCH_CHECK(ctx.size(1) * ctx.size(2) < (int64_t{1} << 31) && ctx.size(3) < (int64_t{1} << 31),
                    "ctx has shape ", shape_text(ctx), "; expected fewer than 2^31 positions in an image");
    STD_TORCH_CHECK(levels <= kMaxLevels, "focal_weights has ", levels, " levels; expected at most ", kMaxLevels);
    Problem p{};
    p.element = element_of("ctx", ctx);
    p.B = ctx.size(0);
    p.H = static_cast<int>(ctx.size(1));
    p.W = static_cast<int>(ctx.size(2));
    p.C = static_cast<int>(ctx.size(3));
    p.L = static_cast<int>(levels);
    p.tensor_cores = tensor_cores;
    p.limits = limits_of(ctx.get_device_index());
    for (size_t l = 0; l < focal_weights.size(); ++l) {
        check_focal_weight(l, focal_weights[l], ctx);
        const Tensor& given = focal_weights[l];
        STD_TORCH_CHECK(given.size(2) <= kMaxKernel && given.size(3) <= kMaxKernel, "focal_weights[", l,
                        "] has shape ", shape_text(given), "; expected kernels of at most ", kMaxKernel, " x ",
                        kMaxKernel);
        p.weights[l] = {nullptr, static_cast<int>(given.size(2)), static_cast<int>(given.size(3))};
    }
    if (tensor_cores) check_tensor_cores(p);
    return p;
}

Arguments parse(const Tensor& ctx, const Tensor& gates, const std::vector<Tensor>& focal_weights, bool normalize,
                bool tensor_cores) {
    check_ctx_and_gates(ctx, gates, static_cast<int64_t>(focal_weights.size()));
    Arguments args{with_unit_channel_stride(ctx),
                   with_unit_channel_stride(gates),
                   {},
                   sizes_of(ctx, focal_weights, tensor_cores)};
    Problem& p = args.problem;
    p.ctx = map_of(args.ctx);
    p.gates = map_of(args.gates);
    p.scale = normalize ? 1.0f / static_cast<float>(p.L + 1) : 1.0f;
    for (const Tensor& w : focal_weights) {
        args.weights.push_back(torch::stable::contiguous(w));
        p.weights[args.weights.size() - 1].data = args.weights.back().const_data_ptr();
    }
    return args;
}

Tensor cuda_gated_aggregation(const Tensor& ctx, const Tensor& gates, std::vector<Tensor> focal_weights,
                              bool normalize_modulator, bool tensor_cores) {
    STD_TORCH_CHECK(ctx.is_cuda(), "ctx is not on a GPU; expected a CUDA tensor");
    const DeviceGuard guard(ctx.get_device_index());
    const Arguments args = parse(ctx, gates, focal_weights, normalize_modulator, tensor_cores);
    Tensor agg = torch::stable::new_empty(ctx, shape_of(ctx));
    const Tensor scratch = scratch_of(ctx, forward_scratch_bytes(args.problem));
    check(gated_aggregation(args.problem, output_map_of(agg), scratch.mutable_data_ptr(),
                            current_stream(ctx.get_device_index())));
    return agg;
}

// What the kernels write instead of a new tensor.
void check_output(const std::string& name, const Tensor& given, const Tensor& input, bool wanted) {
    STD_TORCH_CHECK(wanted, name, " is given, but output_mask does not ask for it; pass None");
    check_map(name, given, input);
    STD_TORCH_CHECK(given.size(3) == input.size(3), name, " has shape ", shape_text(given), "; expected ",
                    shape_text(input));
    check_output_rows(name, given);
}

// The rows of an output lie at one pitch, also where a dimension of 1 has another stride.
Map output_rows_of(const Tensor& t) {
    const int64_t pitch = *row_pitch(t);
    return {t.mutable_data_ptr(), t.size(1) * t.size(2) * pitch, t.size(2) * pitch, pitch};
}

// A map (B, H, W, C) that is a matrix (C, B * H * W) in memory, as takes_planar_maps wants it.
bool is_planar(const Tensor& t) {
    const int64_t image = t.size(1) * t.size(2), strides[] = {image, t.size(2), 1, t.size(0) * image};
    for (int64_t i = 0; i < 4; ++i)
        if (t.size(i) > 1 && t.stride(i) != strides[i]) return false;
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

Tensor planar_like(const Tensor& t) {
    const Tensor planes = torch::stable::new_empty(t, {t.size(3), t.size(0), t.size(1), t.size(2)});
    return torch::stable::transpose(torch::stable::transpose(torch::stable::transpose(planes, 0, 3), 0, 1), 1, 2);
}

// Whether backward of these sizes works on planar maps: dagg is then best given as a view (B, H, W, C) of a matrix
// (C, B * H * W), and agg comes back as such a view.
bool cuda_takes_planar_maps(const Tensor& ctx, std::vector<Tensor> focal_weights, bool tensor_cores) {
    check_map("ctx", ctx, ctx);
    return takes_planar_maps(sizes_of(ctx, focal_weights, tensor_cores));
}

// Returns dctx, dgates, agg (for the modulator's own gradients, which want it again), dfocal_weights. dctx and dgates
// that are given are written, and are empty in the list. agg lies as dagg does where that is planar.
std::vector<Tensor> cuda_gated_aggregation_bwd(const Tensor& dagg, const Tensor& ctx, const Tensor& gates,
                                               std::vector<Tensor> focal_weights, bool normalize_modulator,
                                               bool tensor_cores, std::vector<bool> output_mask,
                                               std::optional<Tensor> dctx, std::optional<Tensor> dgates) {
    STD_TORCH_CHECK(ctx.is_cuda(), "ctx is not on a GPU; expected a CUDA tensor");
    const DeviceGuard guard(ctx.get_device_index());
    const Arguments args = parse(ctx, gates, focal_weights, normalize_modulator, tensor_cores);
    check_dagg(dagg, ctx);
    STD_TORCH_CHECK(output_mask.size() == 4, "output_mask has ", output_mask.size(),
                    " entries; expected four: ctx, gates, agg, focal_weights");
    const bool planar_maps = takes_planar_maps(args.problem) && is_planar(dagg);
    const Tensor dagg_view = planar_maps ? dagg : with_unit_channel_stride(dagg);
    if (dctx) check_output("dctx", *dctx, ctx, output_mask[0]);
    if (dgates) check_output("dgates", *dgates, gates, output_mask[1]);
    std::vector<Tensor> grads{empty_like_if(ctx, output_mask[0] && !dctx),
                              empty_like_if(gates, output_mask[1] && !dgates),
                              planar_maps && output_mask[2] ? planar_like(ctx) : empty_like_if(ctx, output_mask[2])};
    for (const Tensor& w : args.weights) grads.push_back(empty_like_if(w, output_mask[3]));

    Gradients out{};
    out.want_ctx = output_mask[0];
    out.want_gates = output_mask[1];
    out.want_weights = output_mask[3];
    if (out.want_ctx) out.dctx = output_rows_of(dctx ? *dctx : grads[0]);
    if (out.want_gates) out.dgates = output_rows_of(dgates ? *dgates : grads[1]);
    if (output_mask[2]) out.agg = output_map_of(grads[2]);
    out.planar_maps = planar_maps;
    for (size_t l = 0; l < args.weights.size(); ++l) out.dweights[l] = grads[3 + l].mutable_data_ptr();
    const Tensor scratch = scratch_of(ctx, backward_scratch_bytes(args.problem, out));
    check(gated_aggregation_backward(args.problem, map_of(dagg_view), out, scratch.mutable_data_ptr(),
                                     current_stream(ctx.get_device_index())));
    return grads;
}

}  // namespace
}  // namespace focalnet::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(focalnet, m) {
    m.def(
        "cuda_gated_aggregation(Tensor ctx, Tensor gates, Tensor[] focal_weights, bool normalize_modulator, "
        "bool tensor_cores) -> Tensor");
    m.def(
        "cuda_gated_aggregation_bwd(Tensor dagg, Tensor ctx, Tensor gates, Tensor[] focal_weights, "
        "bool normalize_modulator, bool tensor_cores, bool[] output_mask, Tensor(a!)? dctx=None, Tensor(b!)? "
        "dgates=None) "
        "-> Tensor[]");
    m.def("cuda_takes_planar_maps(Tensor ctx, Tensor[] focal_weights, bool tensor_cores) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(focalnet, CUDA, m) {
    m.impl("cuda_gated_aggregation", TORCH_BOX(&focalnet::cuda::cuda_gated_aggregation));
    m.impl("cuda_gated_aggregation_bwd", TORCH_BOX(&focalnet::cuda::cuda_gated_aggregation_bwd));
    m.impl("cuda_takes_planar_maps", TORCH_BOX(&focalnet::cuda::cuda_takes_planar_maps));
}
