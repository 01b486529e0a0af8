// What the two ways of going backward share: whole planes (gated_aggregation_bwd_planes.cu) and level by level
// (gated_aggregation_bwd.cu).

#pragma once

#include "launch.cuh"

namespace focalnet::cuda {

inline int blocks_for(int64_t n, int64_t size) { return static_cast<int>((n + size - 1) / size); }

// dweight of one level: the sum of partials [parts][taps][C] in a fixed order.
template <typename T>
Status sum_partials(const Problem& p, int level, const float* partials, int64_t parts, void* dweight,
                    cudaStream_t stream);

// dgates, contiguous: the sum of partials [blocks][B * H * W][L + 1], times the scale.
template <typename T>
Status sum_dgates(const Problem& p, const float* partials, int blocks, void* dgates, cudaStream_t stream);

template <typename T>
size_t scratch_bytes_of_planes(const Problem& p, const Gradients& out);
template <typename T>
Status backward_of_planes(const Problem& p, const Map& dagg, const Gradients& out, void* scratch, cudaStream_t stream);

}  // namespace focalnet::cuda
