// What the driver of the GELU of an MLP and its kernels agree on. Plain data only, as in gated_aggregation.h.

#pragma once

#include <cstdint>

namespace focalnet::cpu {

// Contiguous rows of `columns` float32 each.
struct GeluTask {
    float* fc1;         // forward: gets the bias added; backward: read
    float* act;         // written
    float* dact;        // backward: in place
    const float* bias;  // forward: of `columns`, or null
    int64_t rows, columns;
};

}  // namespace focalnet::cpu
