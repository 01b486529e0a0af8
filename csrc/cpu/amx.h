// Whether products can run on AMX.

#pragma once

// The kernels are compiled if the compiler has AMX's intrinsics (GCC from 11 on, Clang from 12 on). Linux grants the
// registers to a process that asks; other systems are not asked.
#if defined(__x86_64__) && defined(__linux__) && (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>))
#define FOCALNET_HAS_AMX 1
#else
#define FOCALNET_HAS_AMX 0
#endif

namespace focalnet::cpu {

// Why this process cannot run AMX's products of bfloat16, or null. The first call asks the system for the registers,
// for all threads of the process.
const char* why_not_amx();

}  // namespace focalnet::cpu
