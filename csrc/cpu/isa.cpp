// Choice of the instruction set, and the operators that query and change it.

#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <string>

#include "amx.h"

namespace focalnet::cpu {
namespace {

// Every 64-bit Arm processor has NEON, so "plain" and "neon" are the same code there. "emulated" and "amx_emulated"
// are "plain" with slow emulations of the products of "avx512_bf16" and "amx", for tests.
enum class Isa : int { kEmulated, kAmxEmulated, kPlain, kNeon, kAvx2, kAvx512, kAvx512Bf16, kAmx };

struct Choice {
    Isa isa;
    const char* name;
};

constexpr Choice kChoices[] = {{Isa::kEmulated, "emulated"},
                               {Isa::kAmxEmulated, "amx_emulated"},
                               {Isa::kPlain, "plain"},
                               {Isa::kNeon, "neon"},
                               {Isa::kAvx2, "avx2"},
                               {Isa::kAvx512, "avx512"},
                               {Isa::kAvx512Bf16, "avx512_bf16"},
                               {Isa::kAmx, "amx"}};

bool runs_here(Isa isa) {
    switch (isa) {
        case Isa::kEmulated:
        case Isa::kAmxEmulated:
        case Isa::kPlain:
            return true;
        case Isa::kNeon:
#if defined(__aarch64__)
            return true;
#else
            return false;
#endif
        case Isa::kAvx2:
#if defined(__x86_64__)
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
            return false;
#endif
        case Isa::kAvx512:
#if defined(__x86_64__)
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
#else
            return false;
#endif
        case Isa::kAvx512Bf16:
#if defined(__x86_64__)
            return runs_here(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
#else
            return false;
#endif
        case Isa::kAmx:
            return runs_here(Isa::kAvx512Bf16) && why_not_amx() == nullptr;
    }
    return false;
}

#if defined(__x86_64__)
// Zen 4 executes 512-bit vectors in two halves, so the larger tiles of AVX-512 gain nothing over those of AVX2.
bool halves_wide_vectors() {
    static const bool is_zen4 = [] {
        unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
        __get_cpuid(0, &eax, &ebx, &ecx, &edx);
        const bool is_amd = ebx == signature_AMD_ebx && ecx == signature_AMD_ecx && edx == signature_AMD_edx;
        __get_cpuid(1, &eax, &ebx, &ecx, &edx);
        const unsigned family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
        return is_amd && family == 0x19;
    }();
    return is_zen4;
}
#endif

Isa best() {
    Isa isa = Isa::kPlain;
    for (const Choice& c : kChoices)
        if (runs_here(c.isa)) isa = c.isa;
    return isa;
}

Isa parse(const std::string& name, const char* source) {
    std::string known;
    for (const Choice& c : kChoices) {
        if (name == c.name) {
            STD_TORCH_CHECK(runs_here(c.isa), source, ": isa ", name, " does not run on this processor");
            return c.isa;
        }
        known += (known.empty() ? "" : ", ") + std::string(c.name);
    }
    STD_TORCH_CHECK(false, source, ": unknown isa '", name, "'; expected one of ", known);
    return Isa::kPlain;
}

// Ignores an override that the processor cannot run, because it must not make the library fail to load.
Isa initial() {
    const char* wanted = std::getenv("FOCALNET_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return best();
    for (const Choice& c : kChoices)
        if (std::string(wanted) == c.name && runs_here(c.isa)) return c.isa;
    return best();
}

std::atomic<Isa>& state() {
    static std::atomic<Isa> isa{initial()};
    return isa;
}

std::string name_of(Isa isa) {
    for (const Choice& c : kChoices)
        if (c.isa == isa) return c.name;
    return "plain";
}

std::string cpu_isa() { return name_of(state().load(std::memory_order_relaxed)); }

// Why AMX does not run here; empty if it does.
std::string cpu_why_not_amx() {
    if (runs_here(Isa::kAmx)) return "";
    return why_not_amx() != nullptr ? why_not_amx() : "the processor has no avx512_bf16";
}

std::string cpu_set_isa(std::string isa) { return name_of(state().exchange(parse(isa, "cpu_set_isa"))); }

}  // namespace

const Kernels& current_kernels() {
#if defined(__x86_64__)
    const Isa isa = state().load(std::memory_order_relaxed);
    if (isa == Isa::kAvx512 || isa == Isa::kAvx512Bf16 || isa == Isa::kAmx) return kAvx512Kernels;
    if (isa == Isa::kAvx2) return kAvx2Kernels;
#endif
    return kPlainKernels;
}

Products products_of(Element weights) {
    const Isa isa = state().load(std::memory_order_relaxed);
    const bool is_float = weights == Element::kFloat32;
    if (!is_float && isa == Isa::kEmulated) return kEmulatedDotProducts;
    if (!is_float && isa == Isa::kAmxEmulated) return kEmulatedAmxProducts;
#if FOCALNET_HAS_AMX
    if (!is_float && isa == Isa::kAmx) return kAmxProducts;
#endif
    const Kernels* kernels = &current_kernels();
#if defined(__x86_64__)
    if (!is_float && isa == Isa::kAvx512Bf16) return kDotProducts;
    if (isa == Isa::kAvx512Bf16 && halves_wide_vectors()) kernels = &kAvx2Kernels;
#endif
    return {is_float ? Element::kFloat32 : Element::kRounded,
            kDepth,
            1,
            1,
            kernels->pack,
            kernels->gemm,
            kernels->weight_gradient};
}

}  // namespace focalnet::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(focalnet, m) {
    m.def("cpu_isa() -> str");
    m.def("cpu_why_not_amx() -> str");
    m.def("cpu_set_isa(str isa) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(focalnet, CompositeExplicitAutograd, m) {
    m.impl("cpu_isa", TORCH_BOX(&focalnet::cpu::cpu_isa));
    m.impl("cpu_why_not_amx", TORCH_BOX(&focalnet::cpu::cpu_why_not_amx));
    m.impl("cpu_set_isa", TORCH_BOX(&focalnet::cpu::cpu_set_isa));
}
