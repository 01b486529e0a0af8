// Which instruction set the kernels use: the best one this processor has, unless FOCALNET_CPU_ISA (read once, at first
// use) or the operator focalnet::cpu_set_isa says otherwise.

#pragma once

#include "gated_aggregation.h"

namespace focalnet::cpu {

const Kernels& current_kernels();

}  // namespace focalnet::cpu
