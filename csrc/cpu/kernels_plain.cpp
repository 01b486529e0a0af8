// The kernels for the baseline of the architecture: SSE2 on x86-64 and NEON on 64-bit Arm. Elsewhere they use vectors
// of four, which the compiler lowers to what the processor has.

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "block.h"
#include "gated_aggregation.h"
#include "gelu_rows.h"

#define FOCALNET_LANES 4

namespace focalnet::cpu::plain {
namespace {
// clang-format off
#include "vec.inc"
#include "gelu.inc"
#include "depthwise.inc"
#include "gated_aggregation_fwd.inc"
#include "gated_aggregation_bwd.inc"
#include "panels.inc"
#include "tile_ops.inc"
#include "weight_gradient.inc"
#include "gemm.inc"
#include "dot.inc"
#include "dot_gemm.inc"
#include "rows.inc"
#include "gelu_rows.inc"
// clang-format on
}  // namespace
}  // namespace focalnet::cpu::plain

namespace focalnet::cpu {
const Kernels kPlainKernels = {plain::kLanes,        plain::forward,        plain::forward_global,    plain::backward,
                               plain::pack,          plain::gemm,           plain::normalize_and_add, plain::gelu,
                               plain::gelu_backward, plain::weight_gradient};

// For testing the dot products of AVX512_BF16 on processors without it.
const Products kEmulatedDotProducts = {Element::kBFloat16,        kDotDepth, 2, 2, plain::pack_dot, plain::dot_gemm,
                                       plain::dot_weight_gradient};
}  // namespace focalnet::cpu
