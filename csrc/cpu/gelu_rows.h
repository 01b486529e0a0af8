// The interface between the operators for an MLP and the kernels of its GELU. Plain data only, as in
// gated_aggregation.h.

#pragma once

#include <cstdint>

#include "gated_aggregation.h"

namespace focalnet::cpu {

// Rows of `columns` elements each; fc1 is contiguous.
struct GeluTask {
    Element element;  // kFloat32 or kBFloat16
    const void* fc1;
    void* act;   // written
    void* dact;  // backward: updated in place
    int64_t rows, columns;
    int64_t pitch;  // of act and dact
};

}  // namespace focalnet::cpu
