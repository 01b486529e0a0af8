// The instruction set that the kernels use. It is the best one that the processor has, unless FOCALNET_CPU_ISA (read
// once, at first use) or the operator focalnet::cpu_set_isa selects another.

#pragma once

#include "block.h"
#include "gated_aggregation.h"

namespace focalnet::cpu {

const Kernels& current_kernels();

// How to compute products with weights of the given element. bfloat16 weights use dot products if the processor has
// instructions for them. All other products are computed in float32.
Products products_of(Element weights);

}  // namespace focalnet::cpu
