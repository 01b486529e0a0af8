// The size of the caches of the processor that runs the kernels. For drivers only, see gated_aggregation.h.

#pragma once

#include <cstdint>

namespace focalnet::cpu {

// Bytes of the L2 of a core: 512 KB if the system does not tell. Read once, at first use; the operator
// focalnet::cpu_set_l2_bytes changes it, for tests.
int64_t l2_bytes();

// The budget of a thread's scratch, whose best value for an L2 of 512 KB is `bytes`. A smaller L2 gets its share of
// it. Results must not depend on it.
int64_t l2_share(int64_t bytes);

}  // namespace focalnet::cpu
