// The kernels for x86-64 processors with AVX-512 (F, VL, BW, DQ). Nothing may be included after the target is
// selected: see gated_aggregation.h.

#if defined(__x86_64__)

#include <immintrin.h>

#include "block.h"
#include "gated_aggregation.h"
#include "gelu_rows.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                       \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")
#endif

#define FOCALNET_LANES 16

namespace focalnet::cpu::avx512 {
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
}  // namespace focalnet::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace focalnet::cpu {
const Kernels kAvx512Kernels = {
    avx512::kLanes, avx512::forward,           avx512::forward_global, avx512::backward,      avx512::pack,
    avx512::gemm,   avx512::normalize_and_add, avx512::gelu,           avx512::gelu_backward, avx512::weight_gradient};
}

#endif
