// The products of kernels_amx.cpp with AMX's instructions emulated, for tests on processors without AMX.

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "block.h"
#include "gated_aggregation.h"

#define FOCALNET_LANES 4
#define FOCALNET_AMX_TILES

namespace focalnet::cpu::amx_emulated {
namespace {
// clang-format off
#include "vec.inc"
#include "gelu.inc"
#include "panels.inc"
#include "tile_ops.inc"
#include "weight_gradient.inc"
#include "dot.inc"
#include "amx_emulation.inc"
#include "dot_gemm.inc"
// clang-format on
}  // namespace
}  // namespace focalnet::cpu::amx_emulated

namespace focalnet::cpu {
const Products kEmulatedAmxProducts = {Element::kBFloat16,
                                       kDotDepth,
                                       2,
                                       2,
                                       amx_emulated::pack_dot,
                                       amx_emulated::dot_gemm,
                                       amx_emulated::dot_weight_gradient};
}
