// The kernels for x86-64 processors with AVX2 and FMA. Nothing may be included after the target is selected: see
// gated_aggregation.h.

#if defined(__x86_64__)

#include <immintrin.h>

#include "block.h"
#include "gated_aggregation.h"
#include "gelu_rows.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define FOCALNET_LANES 8

namespace focalnet::cpu::avx2 {
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
#include "rows.inc"
#include "gelu_rows.inc"
// clang-format on
}  // namespace
}  // namespace focalnet::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace focalnet::cpu {
const Kernels kAvx2Kernels = {avx2::kLanes,        avx2::forward,        avx2::forward_global,    avx2::backward,
                              avx2::pack,          avx2::gemm,           avx2::normalize_and_add, avx2::gelu,
                              avx2::gelu_backward, avx2::weight_gradient};
}

#endif
