// Which instruction set the kernels use: the best one this processor has, unless FOCALNET_CPU_ISA (read once, at first
// use) or the operator focalnet::cpu_set_isa says otherwise.

#pragma once

#include "block.h"
#include "gated_aggregation.h"

namespace focalnet::cpu {

const Kernels& current_kernels();

// How to compute products with weights of an element: those of bfloat16 by dot products where there are instructions
// for them, else in float32.
Products products_of(Element weights);

}  // namespace focalnet::cpu
