// The interface between the operators for an MLP's GELU and their kernels. Plain data only, as in gated_aggregation.h.

#pragma once

#include <cstdint>

namespace focalnet::cpu {

// Contiguous rows of `columns` float32 each.
struct GeluTask {
    float* fc1;         // forward: the bias is added in place; backward: read
    float* act;         // written
    float* dact;        // backward: updated in place
    const float* bias;  // forward: [columns], or null
    int64_t rows, columns;
};

}  // namespace focalnet::cpu
