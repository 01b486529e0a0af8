// The instruction vdpbf16ps and its emulation (csrc/cpu/dot.inc) on random operands: counts where their bits differ.
// To be compiled for a processor that has the instruction.

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <random>

#define FOCALNET_LANES 4
namespace emulation {
#include "vec.inc"
//
#include "dot.inc"
}  // namespace emulation
#undef FOCALNET_LANES
#define FOCALNET_LANES 16
namespace instruction {
#include "vec.inc"
//
#include "dot.inc"
}  // namespace instruction

namespace {

std::mt19937 generator(1);

uint32_t between(uint32_t low, uint32_t high) { return low + generator() % (high - low); }

// A float32 with an exponent field in [low, high).
uint32_t single(uint32_t low, uint32_t high) { return (generator() & 0x807fffffu) | between(low, high) << 23; }
uint32_t half(uint32_t low, uint32_t high) { return single(low, high) >> 16; }
uint32_t pair(uint32_t low, uint32_t high) { return half(low, high) | half(low, high) << 16; }

struct Operands {
    uint32_t acc[16], a[16], b[16];
};

template <typename Vec>
Vec vector(const uint32_t* bits) {
    Vec v;
    __builtin_memcpy(&v, bits, sizeof v);
    return v;
}

// Which of several NaN comes out is left to the compiler: it may swap the factors of the emulation.
bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

int differences(const Operands& x) {
    uint32_t expected[16], found[16];
    using Wide = instruction::Vec;
    const Wide wide = instruction::dot(vector<Wide>(x.acc), vector<Wide>(x.a), vector<Wide>(x.b));
    __builtin_memcpy(expected, &wide, sizeof expected);
    int differ = 0;
    for (int i = 0; i < 16; i += 4) {
        using Narrow = emulation::Vec;
        const Narrow sum = emulation::dot(vector<Narrow>(x.acc + i), vector<Narrow>(x.a + i), vector<Narrow>(x.b + i));
        __builtin_memcpy(found + i, &sum, sizeof sum);
    }
    for (int i = 0; i < 16; ++i) differ += expected[i] != found[i] && !(is_nan(expected[i]) && is_nan(found[i]));
    return differ;
}

struct Kind {
    const char* name;
    uint32_t low, high;          // exponents of the factors
    uint32_t acc_low, acc_high;  // of the sum
};

}  // namespace

int main() {
    const Kind kinds[] = {{"any bits", 0, 256, 0, 256},
                          {"near one", 120, 136, 120, 140},
                          {"denormal products and sums", 55, 75, 0, 20},
                          {"denormal factors", 0, 2, 0, 2},
                          {"overflow, infinities and NaN", 185, 256, 250, 256}};
    for (const Kind& kind : kinds) {
        int differ = 0;
        for (int n = 0; n < 100000; ++n) {
            Operands x;
            for (int i = 0; i < 16; ++i) {
                x.acc[i] = single(kind.acc_low, kind.acc_high);
                x.a[i] = pair(kind.low, kind.high);
                x.b[i] = pair(kind.low, kind.high);
            }
            differ += differences(x);
        }
        std::printf("%s: %d\n", kind.name, differ);
    }
}
