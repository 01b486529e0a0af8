// What modulate.cu offers to its operators (modulate_ops.cpp): products of maps row by row, and their sums over rows.
// Plain data, as in gated_aggregation.h.

#pragma once

#include "gated_aggregation.h"

namespace focalnet::cuda {

// A row is the C channels of a position, with channel stride 1; `pitch` elements from row to row.
struct Rows {
    void* data;
    int64_t pitch;
};

struct RowsProblem {
    Element element;
    int64_t rows;
    int C;
    int multiprocessors;
};

// out = a * b, rounded once. `out` may be a or b.
Status modulate(const RowsProblem& p, const Rows& a, const Rows& b, const Rows& out, cudaStream_t stream);

// The same, and sum (C,) = the sum of a * b over the rows, in float32 and in a fixed order, rounded once.
size_t modulate_and_sum_scratch_bytes(const RowsProblem& p);
Status modulate_and_sum(const RowsProblem& p, const Rows& a, const Rows& b, const Rows& out, void* sum, void* scratch,
                        cudaStream_t stream);

}  // namespace focalnet::cuda
