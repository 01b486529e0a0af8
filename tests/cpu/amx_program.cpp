// One tdpbf16ps on random tiles, three ways: its emulation (csrc/cpu/amx_emulation.inc), its definition in double
// precision, and, on a processor that has it, the instruction. Counts where their bits differ. The number of rows is
// given as argument.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "amx.h"

#define FOCALNET_LANES 4
namespace emulation {
#include "vec.inc"
//
#include "dot.inc"
//
#include "amx_emulation.inc"
}  // namespace emulation

namespace {

struct Tiles {
    alignas(64) uint32_t a[16][16], b[16][16], c[16][16];
};

struct Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

Shapes shapes_of(int rows) {
    Shapes shapes;
    for (int i = 0; i < 3; ++i) {
        shapes.row_bytes[i] = 64;
        shapes.rows[i] = static_cast<uint8_t>(i == 2 ? 16 : rows);
    }
    return shapes;
}

void emulate(const Shapes& shapes, const Tiles& x, uint32_t (&sum)[16][16]) {
    emulation::_tile_loadconfig(&shapes);
    emulation::_tile_loadd(0, x.c, 64);
    emulation::_tile_loadd(1, x.a, 64);
    emulation::_tile_loadd(2, x.b, 64);
    emulation::_tile_dpbf16ps(0, 1, 2);
    emulation::_tile_stored(0, sum, 64);
    emulation::_tile_release();
}

float single(uint32_t bits) { return __builtin_bit_cast(float, bits); }
float no_denormal(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }
// Products of bfloat16 are exact in double, and the sum is too wherever it could be rounded twice.
float fused(uint32_t a, uint32_t b, float sum) {
    const double product = static_cast<double>(no_denormal(single(a))) * no_denormal(single(b));
    return no_denormal(static_cast<float>(product + sum));
}
float added(float a, float b) { return no_denormal(no_denormal(a) + no_denormal(b)); }

void define(int rows, const Tiles& x, uint32_t (&sum)[16][16]) {
    for (int m = 0; m < rows; ++m)
        for (int n = 0; n < 16; ++n) {
            float even = 0.0f, odd = 0.0f;
            for (int k = 0; k < 16; ++k) {
                even = fused(x.a[m][k] << 16, x.b[k][n] << 16, even);
                odd = fused(x.a[m][k] & 0xffff0000u, x.b[k][n] & 0xffff0000u, odd);
            }
            sum[m][n] = __builtin_bit_cast(uint32_t, added(single(x.c[m][n]), added(even, odd)));
        }
}

}  // namespace

#include <immintrin.h>

namespace {

void execute(const Shapes& shapes, const Tiles& x, uint32_t (&sum)[16][16]) {
    asm volatile("" ::"r"(&shapes) : "memory");
    _tile_loadconfig(&shapes);
    _tile_loadd(0, x.c, 64);
    _tile_loadd(1, x.a, 64);
    _tile_loadd(2, x.b, 64);
    _tile_dpbf16ps(0, 1, 2);
    _tile_stored(0, sum, 64);
    _tile_release();
}

std::mt19937 generator(1);

// A float32 with an exponent field in [low, high).
uint32_t with_exponent(uint32_t low, uint32_t high) {
    return (generator() & 0x807fffffu) | (low + generator() % (high - low)) << 23;
}
uint32_t pair(uint32_t low, uint32_t high) {
    return with_exponent(low, high) >> 16 | (with_exponent(low, high) & 0xffff0000u);
}

bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

int differences(int rows, const uint32_t (&a)[16][16], const uint32_t (&b)[16][16]) {
    int differ = 0;
    for (int m = 0; m < rows; ++m)
        for (int n = 0; n < 16; ++n) differ += a[m][n] != b[m][n] && !(is_nan(a[m][n]) && is_nan(b[m][n]));
    return differ;
}

struct Kind {
    const char* name;
    uint32_t low, high;          // exponents of the factors
    uint32_t acc_low, acc_high;  // of the sum
};

}  // namespace

int main(int, char** arguments) {
    const int rows = std::atoi(arguments[1]);
    const Kind kinds[] = {{"any bits", 0, 256, 0, 256},
                          {"near one", 120, 136, 120, 140},
                          {"denormal products and sums", 55, 75, 0, 20},
                          {"denormal factors", 0, 2, 0, 2},
                          {"overflow, infinities and NaN", 185, 256, 250, 256}};
    const Shapes shapes = shapes_of(rows);
    const char* why_not = focalnet::cpu::why_not_amx();
    std::printf("%s\n", why_not == nullptr ? "" : why_not);
    for (const Kind& kind : kinds) {
        int from_definition = 0, from_instruction = 0;
        for (int trial = 0; trial < 300; ++trial) {
            Tiles x;
            for (int i = 0; i < 16; ++i)
                for (int j = 0; j < 16; ++j) {
                    x.a[i][j] = pair(kind.low, kind.high);
                    x.b[i][j] = pair(kind.low, kind.high);
                    x.c[i][j] = with_exponent(kind.acc_low, kind.acc_high);
                }
            uint32_t emulated[16][16], defined[16][16], found[16][16];
            emulate(shapes, x, emulated);
            define(rows, x, defined);
            from_definition += differences(rows, emulated, defined);
            if (why_not == nullptr) {
                execute(shapes, x, found);
                from_instruction += differences(rows, emulated, found);
            }
        }
        std::printf("%s: %d %d\n", kind.name, from_definition, from_instruction);
    }
}
