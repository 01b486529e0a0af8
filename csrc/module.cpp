// The Python module focalnet._C: facts about the build and the machine, and the class Structure. The operators are in
// csrc/cpu/ and csrc/cuda/ and register themselves with torch when this module is loaded. This file includes no header
// of torch, so the module depends on Python's ABI only.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/amx.h"
#include "structure.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#elif defined(_MSC_VER)
    return "msvc " + std::to_string(_MSC_FULL_VER);
#else
    return "unknown";
#endif
}

long cxx_standard() {
#if defined(_MSVC_LANG)
    // MSVC keeps __cplusplus at 199711 unless told otherwise.
    return _MSVC_LANG;
#else
    return __cplusplus;
#endif
}

std::string torch_target_version() {
#if defined(TORCH_TARGET_VERSION)
    constexpr uint64_t version = TORCH_TARGET_VERSION;
    return std::to_string(version >> 56) + "." + std::to_string((version >> 48) & 0xff);
#else
    return "";
#endif
}

// The instruction sets that the compiler may use in all code. Instruction sets enabled for single functions and
// selected at run time are not included.
py::list baseline_instruction_sets() {
    py::list sets;
#if defined(__SSE2__) || defined(_M_X64)
    sets.append("sse2");
#endif
#if defined(__AVX__)
    sets.append("avx");
#endif
#if defined(__AVX2__)
    sets.append("avx2");
#endif
#if defined(__FMA__)
    sets.append("fma");
#endif
#if defined(__AVX512F__)
    sets.append("avx512f");
#endif
#if defined(__ARM_NEON) || defined(_M_ARM64)
    sets.append("neon");
#endif
#if defined(__ARM_FEATURE_SVE)
    sets.append("sve");
#endif
    return sets;
}

py::dict build_info() {
    py::dict info;
    info["compiler"] = compiler();
    info["cxx_standard"] = cxx_standard();
    info["torch_target_version"] = torch_target_version();
#if defined(FOCALNET_BUILT_WITH_TORCH)
    info["built_with_torch"] = FOCALNET_BUILT_WITH_TORCH;
#else
    info["built_with_torch"] = "";
#endif
    info["baseline_instruction_sets"] = baseline_instruction_sets();
    return info;
}

// The dictionary has the same keys on every platform, named as in Linux's /proc/cpuinfo. A capability that cannot be
// queried (another architecture, a compiler without the builtin) counts as absent: the slower path always works, while
// an unsupported instruction crashes.
py::dict cpu_capabilities() {
    bool avx = false, avx2 = false, fma = false, f16c = false;
    bool avx512f = false, avx512bw = false, avx512dq = false, avx512vl = false;
    bool avx512_vnni = false, avx512_bf16 = false;
    const bool amx_bf16 = focalnet::cpu::why_not_amx() == nullptr;
    bool neon = false, sve = false;

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
    // Unlike cpuid, the builtins also check that the operating system saves the wide registers.
    __builtin_cpu_init();
    avx = __builtin_cpu_supports("avx");
    avx2 = __builtin_cpu_supports("avx2");
    fma = __builtin_cpu_supports("fma");
    f16c = __builtin_cpu_supports("f16c");
    avx512f = __builtin_cpu_supports("avx512f");
    avx512bw = __builtin_cpu_supports("avx512bw");
    avx512dq = __builtin_cpu_supports("avx512dq");
    avx512vl = __builtin_cpu_supports("avx512vl");
    avx512_vnni = __builtin_cpu_supports("avx512vnni");
    avx512_bf16 = __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__) || defined(_M_ARM64)
    neon = true;  // part of the architecture
#if defined(__linux__) && defined(HWCAP_SVE)
    sve = (getauxval(AT_HWCAP) & HWCAP_SVE) != 0;
#endif
#endif

    py::dict found;
    found["avx"] = avx;
    found["avx2"] = avx2;
    found["fma"] = fma;
    found["f16c"] = f16c;
    found["avx512f"] = avx512f;
    found["avx512bw"] = avx512bw;
    found["avx512dq"] = avx512dq;
    found["avx512vl"] = avx512vl;
    found["avx512_vnni"] = avx512_vnni;
    found["avx512_bf16"] = avx512_bf16;
    found["amx_bf16"] = amx_bf16;
    found["neon"] = neon;
    found["sve"] = sve;
    return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Build facts and CPU capabilities; loading it registers the compiled operators with torch.";
    m.def("build_info", &build_info, "How this extension was compiled.");
    py::class_<focalnet::Structure>(m, "Structure", "A record of a tree of modules without the values of its tensors.")
        .def(py::init<py::handle>(), py::arg("module"))
        .def("parameters_of", &focalnet::Structure::parameters_of, py::arg("module"),
             "The module's parameters in the order of the record; None if the module differs from the record.");
    m.def("cpu_capabilities", &cpu_capabilities, "Instruction set name -> whether this machine has it.");
}
