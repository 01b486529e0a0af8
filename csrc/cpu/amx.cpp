// Detection of AMX. Three have to agree: the processor, the system that saves the registers (XCR0), and the kernel,
// which grants the 8 KB of tiles to a process only after it has asked for them.

#include "amx.h"

#if FOCALNET_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace focalnet::cpu {
namespace {

#if FOCALNET_HAS_AMX

constexpr unsigned kOsxsave = 1u << 27;                       // leaf 1, ecx
constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // leaf 7, edx
constexpr unsigned kTileState = 1u << 17 | 1u << 18;          // XCR0: configuration and data
constexpr long kRequestPermission = 0x1023, kTileData = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

bool processor_has_amx() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kAmxBf16) != 0 && (edx & kAmxTile) != 0;
}

bool system_saves_tiles() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || (ecx & kOsxsave) == 0) return false;
    asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (eax & kTileState) == kTileState;
}

const char* asked() {
    if (!processor_has_amx()) return "the processor has no amx_tile and amx_bf16";
    if (!system_saves_tiles()) return "the operating system does not save AMX's registers";
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
        return "the kernel does not grant AMX's registers to this process";
    return nullptr;
}

#elif defined(__x86_64__) && defined(__linux__)

const char* asked() { return "the extension was built by a compiler without AMX"; }

#else

const char* asked() { return "AMX is used on x86-64 Linux only"; }

#endif

}  // namespace

const char* why_not_amx() {
    static const char* const reason = asked();
    return reason;
}

}  // namespace focalnet::cpu
