// Checks of tensor arguments, shared by the operators of all devices. A message names the argument, what was passed
// and what was expected.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
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

// Requires the device and the dtype of another argument.
inline void check_like(const std::string& name, const Tensor& t, const Tensor& like,
                       const std::string& like_name = "ctx") {
    if (like.is_cuda()) {
        STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name, " is not on ", like_name,
                        "'s device; expected cuda:", like.get_device_index());
    } else {
        check_cpu(name, t);
    }
    STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " has dtype ",
                    torch::headeronly::toString(t.scalar_type()), "; expected ", like_name, "'s dtype, ",
                    torch::headeronly::toString(like.scalar_type()));
}

inline void check_map(const std::string& name, const Tensor& t, const Tensor& like,
                      const std::string& like_name = "ctx") {
    STD_TORCH_CHECK(t.dim() == 4, name, " has shape ", shape_text(t),
                    "; expected four dimensions (B, H, W, channels)");
    check_like(name, t, like, like_name);
    for (int64_t i = 0; i < 3; ++i)
        STD_TORCH_CHECK(t.size(i) == like.size(i), name, " has shape ", shape_text(t),
                        "; expected the same B, H and W as ", like_name, ", whose shape is ", shape_text(like));
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

// Elements from one row of channels to the next, if all rows of a map (B, H, W, C) lie at one pitch.
inline std::optional<int64_t> row_pitch(const Tensor& t) {
    std::optional<int64_t> pitch;
    int64_t rows = 1;
    for (int64_t i = 2; i >= 0; --i) {
        if (t.size(i) == 0) return t.size(3);
        if (t.size(i) == 1) continue;
        if (!pitch) pitch = t.stride(i);
        if (t.stride(i) != rows * *pitch) return std::nullopt;
        rows *= t.size(i);
    }
    return pitch ? pitch : t.size(3);
}

// Requires rows that kernels can write: at one pitch, with channel stride 1, none in another.
inline void check_output_rows(const std::string& name, const Tensor& t) {
    const auto pitch = row_pitch(t);
    STD_TORCH_CHECK(
        (t.stride(3) == 1 || t.size(3) <= 1) && pitch && *pitch >= t.size(3), name, " has strides (", t.stride(0),
        ", ", t.stride(1), ", ", t.stride(2), ", ", t.stride(3),
        "); expected channel stride 1 and rows of channels at one pitch, such as a part of a packed gradient");
}

// An uninitialised tensor of t's shape, or an empty placeholder if it is not wanted.
inline Tensor empty_like_if(const Tensor& t, bool wanted) {
    return torch::stable::new_empty(t, wanted ? shape_of(t) : Shape{0});
}

}  // namespace focalnet
