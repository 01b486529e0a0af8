// Checks of tensor arguments, shared by the operators of all devices. A message names the argument, what was passed
// and what was expected.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

namespace focalnet {

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

inline std::string shape_text(const Tensor& t) { return text(shape_of(t)); }

inline void check_cpu(const std::string& name, const Tensor& t) {
    STD_TORCH_CHECK(t.is_cpu(), name, " is not on the CPU; expected a CPU tensor");
}

// Requires the device and the dtype of ctx.
inline void check_like(const std::string& name, const Tensor& t, const Tensor& ctx) {
    if (ctx.is_cuda()) {
        STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == ctx.get_device_index(), name,
                        " is not on ctx's device; expected cuda:", ctx.get_device_index());
    } else {
        check_cpu(name, t);
    }
    STD_TORCH_CHECK(t.scalar_type() == ctx.scalar_type(), name, " has dtype ",
                    torch::headeronly::toString(t.scalar_type()), "; expected ctx's dtype, ",
                    torch::headeronly::toString(ctx.scalar_type()));
}

inline void check_map(const std::string& name, const Tensor& t, const Tensor& ctx) {
    STD_TORCH_CHECK(t.dim() == 4, name, " has shape ", shape_text(t),
                    "; expected four dimensions (B, H, W, channels)");
    check_like(name, t, ctx);
    for (int64_t i = 0; i < 3; ++i)
        STD_TORCH_CHECK(t.size(i) == ctx.size(i), name, " has shape ", shape_text(t),
                        "; expected the same B, H and W as ctx, whose shape is ", shape_text(ctx));
}

inline void check_ctx_and_gates(const Tensor& ctx, const Tensor& gates, int64_t levels) {
    check_map("ctx", ctx, ctx);
    check_map("gates", gates, ctx);
    STD_TORCH_CHECK(ctx.size(1) >= 1 && ctx.size(2) >= 1 && ctx.size(3) >= 1, "ctx has shape ", shape_text(ctx),
                    "; expected H, W and C of at least 1");
    STD_TORCH_CHECK(levels >= 1, "focal_weights is empty; expected at least one level");
    STD_TORCH_CHECK(gates.size(3) == levels + 1, "gates has shape ", shape_text(gates), "; expected ", levels + 1,
                    " channels, one more than the ", levels, " focal_weights");
}

inline void check_focal_weight(size_t level, const Tensor& w, const Tensor& ctx) {
    const std::string name = "focal_weights[" + std::to_string(level) + "]";
    check_like(name, w, ctx);
    STD_TORCH_CHECK(
        w.dim() == 4 && w.size(0) == ctx.size(3) && w.size(1) == 1 && w.size(2) % 2 == 1 && w.size(3) % 2 == 1, name,
        " has shape ", shape_text(w), "; expected (", ctx.size(3), ", 1, kh, kw) with odd kh and kw");
}

inline void check_dagg(const Tensor& dagg, const Tensor& ctx) {
    check_map("dagg", dagg, ctx);
    STD_TORCH_CHECK(dagg.size(3) == ctx.size(3), "dagg has shape ", shape_text(dagg), "; expected ctx's shape ",
                    shape_text(ctx));
}

// The kernels take any strides except for channels: a channel stride other than 1 costs a copy.
inline Tensor with_unit_channel_stride(const Tensor& t) {
    return t.stride(3) == 1 || t.size(3) <= 1 ? t : torch::stable::contiguous(t);
}

// An uninitialised tensor of t's shape, or an empty placeholder if it is not wanted.
inline Tensor empty_like_if(const Tensor& t, bool wanted) {
    return torch::stable::new_empty(t, wanted ? shape_of(t) : Shape{0});
}

}  // namespace focalnet
