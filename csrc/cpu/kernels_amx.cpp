// Products of bfloat16 for x86-64 processors with AMX (amx_tile, amx_bf16) and what kernels_avx512_bf16.cpp needs.
// Nothing may be included after the target is selected: see gated_aggregation.h.

#include "amx.h"

#if FOCALNET_HAS_AMX

#include <immintrin.h>

#include "block.h"
#include "gated_aggregation.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                                \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma,prefer-" \
                          "vector-width=512"))),                                                             \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif

#define FOCALNET_LANES 16
#define FOCALNET_AMX_TILES

namespace focalnet::cpu::amx {
namespace {
// clang-format off
#include "vec.inc"
#include "gelu.inc"
#include "panels.inc"
#include "tile_ops.inc"
#include "weight_gradient.inc"
#include "dot.inc"
#include "dot_gemm.inc"
// clang-format on
}  // namespace
}  // namespace focalnet::cpu::amx

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace focalnet::cpu {
const Products kAmxProducts = {Element::kBFloat16,      kDotDepth, 2, 2, amx::pack_dot, amx::dot_gemm,
                               amx::dot_weight_gradient};
}

#endif
