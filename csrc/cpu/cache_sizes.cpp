// The size of a core's L2, as the system reports it, and the operators that query and change it.

#include "cache_sizes.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <fstream>

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace focalnet::cpu {
namespace {

constexpr int64_t kUsualL2 = 512 * 1024;

// 0 where the C library does not know it: some on Arm, and all but glibc.
int64_t l2_of_library() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    return std::max<int64_t>(0, sysconf(_SC_LEVEL2_CACHE_SIZE));
#else
    return 0;
#endif
}

// Linux writes it as "1024K". 0 if the file is missing or reads otherwise, as on other systems.
int64_t l2_of_kernel() {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index2/size");
    int64_t size = 0;
    char unit = 0;
    if (!(file >> size >> unit) || size <= 0) return 0;
    return unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : 0;
}

int64_t read_l2() {
    for (const int64_t found : {l2_of_library(), l2_of_kernel()})
        if (found > 0) return found;
    return kUsualL2;
}

std::atomic<int64_t>& state() {
    static std::atomic<int64_t> bytes{read_l2()};
    return bytes;
}

// Returns the size before.
int64_t cpu_set_l2_bytes(int64_t bytes) {
    STD_TORCH_CHECK(bytes > 0, "bytes is ", bytes, "; expected the size of an L2");
    return state().exchange(bytes);
}

}  // namespace

int64_t l2_bytes() { return state().load(std::memory_order_relaxed); }

// A larger L2 gets no more: on Zen 4, whose L2 has 1 MB, blocks of twice the size were slower, most so in bfloat16.
int64_t l2_share(int64_t bytes) {
    return bytes * std::min(l2_bytes(), kUsualL2) / kUsualL2;
}

}  // namespace focalnet::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(focalnet, m) {
    m.def("cpu_l2_bytes() -> int");
    m.def("cpu_set_l2_bytes(int bytes) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(focalnet, CompositeExplicitAutograd, m) {
    m.impl("cpu_l2_bytes", TORCH_BOX(&focalnet::cpu::l2_bytes));
    m.impl("cpu_set_l2_bytes", TORCH_BOX(&focalnet::cpu::cpu_set_l2_bytes));
}
