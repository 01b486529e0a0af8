// Products of bfloat16 for x86-64 processors with AVX-512 (F, VL, BW, DQ) and AVX512_BF16. Nothing may be included
// after the target is selected: see gated_aggregation.h.

#if defined(__x86_64__)

#include <immintrin.h>

#include "block.h"
#include "gated_aggregation.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                                  \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif

#define FOCALNET_LANES 16

namespace focalnet::cpu::avx512_bf16 {
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
}  // namespace focalnet::cpu::avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace focalnet::cpu {
const Products kDotProducts = {Element::kBFloat16,
                               kDotDepth,
                               2,
                               2,
                               avx512_bf16::pack_dot,
                               avx512_bf16::dot_gemm,
                               avx512_bf16::dot_weight_gradient};
}

#endif
