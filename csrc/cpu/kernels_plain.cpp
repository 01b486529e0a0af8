// The kernels for what every processor of the architecture has: SSE2 on x86-64, NEON on 64-bit Arm, and elsewhere
// whatever the compiler makes of vectors of four.

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
#include "gemm.inc"
#include "dot.inc"
#include "dot_gemm.inc"
#include "rows.inc"
#include "gelu_rows.inc"
// clang-format on
}  // namespace
}  // namespace focalnet::cpu::plain

namespace focalnet::cpu {
const Kernels kPlainKernels = {plain::kLanes,       plain::forward, plain::forward_global,    plain::backward,
                               plain::pack,         plain::gemm,    plain::normalize_and_add, plain::bias_gelu,
                               plain::gelu_backward};

// For tests of those of AVX-512 where that is not.
const Products kEmulatedDotProducts = {Element::kBFloat16, kDotDepth, 2, 2, plain::pack_dot, plain::dot_gemm};
}  // namespace focalnet::cpu
