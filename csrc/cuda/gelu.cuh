// Exact (erf) GELU and its derivative in float32, without a branch or a division. GELU takes the polynomial of
// csrc/cpu/gelu.inc, where it is derived. With h = z / 2, a = min(|h|, 3) and P(a)^4 = erfc(sqrt 2 a):
//
//     GELU(z) = h + |h| - a P(a)^4                  largest error 2.6e-7 (eager PyTorch's: 3.7e-7)
//     GELU'(z) = Phi(z) + z phi(z)                  largest error 1.5e-7, by exponentials
//
// For 16-bit results P and S have lower degrees, fitted in the same form to the smallest largest error, and are
// written for |z| itself, with the halves in P: one instruction less. Each error stands beside its function.

#pragma once

#include <cstdint>
#include <cstring>

#include "element.cuh"

namespace focalnet::cuda {

__device__ __forceinline__ float fourth_power(float v) {
    const float square = v * v;
    return square * square;
}

// P(a)^4 = erfc(sqrt 2 a)
__device__ __forceinline__ float gelu_tail(float a) {
    float p = 6.64604377e-05f;
    p = fmaf(p, a, -0.000595438119f);
    p = fmaf(p, a, 0.00115083903f);
    p = fmaf(p, a, 0.00463459641f);
    p = fmaf(p, a, -0.0186437592f);
    p = fmaf(p, a, -0.00440399908f);
    p = fmaf(p, a, 0.0733016878f);
    p = fmaf(p, a, 0.0440580286f);
    p = fmaf(p, a, -0.238775462f);
    p = fmaf(p, a, -0.398940265f);
    return fourth_power(fmaf(p, a, 1.0f));
}

__device__ __forceinline__ float gelu(float z) {
    const float h = 0.5f * z, magnitude = fabsf(h), a = fminf(magnitude, 3.0f);
    return fmaf(-a, gelu_tail(a), h + magnitude);
}

// max(v, 0) and min(|v|, 6); NaN stays NaN.
__device__ __forceinline__ float positive_part(float v) {
#ifdef __CUDACC__
    float result;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(v));
    return result;
#else
    return v > 0.0f || v != v ? v : 0.0f;
#endif
}
__device__ __forceinline__ float magnitude_to_six(float v) {
#ifdef __CUDACC__
    float result;
    asm("min.NaN.f32 %0, %1, 0f40C00000;" : "=f"(result) : "f"(fabsf(v)));
    return result;
#else
    return v != v ? v : fminf(fabsf(v), 6.0f);
#endif
}

// Half of erfc(a / sqrt 2) for 16-bit results: P has degree 6 instead of 10. The largest error in GELU is 4.3e-6, a
// hundredth of float16's rounding of a value near 1.
__device__ __forceinline__ float gelu_tail_for_16_bit(float a) {
    float p = 8.57206702e-05f;
    p = fmaf(p, a, -0.00137414640f);
    p = fmaf(p, a, 0.00626842139f);
    p = fmaf(p, a, 0.00220416387f);
    p = fmaf(p, a, -0.0490211526f);
    p = fmaf(p, a, -0.167940313f);
    return fourth_power(fmaf(p, a, 0.840896415f));
}

__device__ __forceinline__ float gelu_for_16_bit(float z) {
    const float a = magnitude_to_six(z);
    return fmaf(-a, gelu_tail_for_16_bit(a), positive_part(z));
}

// S of degree 6 instead of 8, and the P above: largest error 2.5e-5, a twentieth of float16's rounding near 1.
__device__ __forceinline__ float gelu_grad_for_16_bit(float z) {
    const float a = magnitude_to_six(z), s = a * a;
    float p = 1.10894383e-09f;
    p = fmaf(p, s, -1.32490060e-07f);
    p = fmaf(p, s, 7.26282387e-06f);
    p = fmaf(p, s, -0.000253754957f);
    p = fmaf(p, s, 0.00619481998f);
    p = fmaf(p, s, -0.0993270013f);
    p = fmaf(p, s, 0.794739775f);
    const float rise = fmaf(a, fourth_power(p), 0.5f - gelu_tail_for_16_bit(a));
    return 0.5f + copysignf(rise, z);
}

// For 16-bit results, two at a time. For bfloat16 P is formed in float16, two elements an instruction: its error, some
// 2^-11 of P^4, is a fraction of bfloat16's rounding; the rest is float32.
template <typename T>
__device__ __forceinline__ float2 gelu_pair(float x, float y) {
    return {gelu_for_16_bit(x), gelu_for_16_bit(y)};
}
template <>
__device__ __forceinline__ float2 gelu_pair<__nv_bfloat16>(float x, float y) {
    const auto both = [](float v) { return __floats2half2_rn(v, v); };
    const __half2 a = __hmin2(__habs2(__floats2half2_rn(x, y)), both(6.0f));
    __half2 p = both(8.57206702e-05f);
    p = __hfma2(p, a, both(-0.00137414640f));
    p = __hfma2(p, a, both(0.00626842139f));
    p = __hfma2(p, a, both(0.00220416387f));
    p = __hfma2(p, a, both(-0.0490211526f));
    p = __hfma2(p, a, both(-0.167940313f));
    p = __hfma2(p, a, both(0.840896415f));
    p = __hmul2(p, p);
    const float2 tail = __half22float2(__hmul2(__hmul2(p, p), a));
    return {positive_part(x) - tail.x, positive_part(y) - tail.y};
}

// max(v, 0) of two, rounded; NaN stays NaN.
__device__ __forceinline__ __nv_bfloat162 positive_parts(float x, float y) {
#ifdef __CUDACC__
    uint32_t word;
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(y), "f"(x));
    __nv_bfloat162 result;
    memcpy(&result, &word, sizeof result);
    return result;
#else
    return __floats2bfloat162_rn(positive_part(x), positive_part(y));
#endif
}

// Two numbers of float16 that are not negative as bfloat16, times 2^-112: the exponent moves to its place, and three
// bits of the mantissa are cut off.
__device__ __forceinline__ __nv_bfloat162 as_small_bfloat16(__half2 v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    bits = bits >> 3 & 0x1fff1fffu;
    __nv_bfloat162 result;
    memcpy(&result, &bits, sizeof bits);
    return result;
}

// GELU of two as a pair of T. For bfloat16 P has degree 5 and its root at a = 4.67, where it is cut off: the error is
// 2.5e-5, a tenth of what forming it in float16 costs. P^4 is larger by 0.0023, half of what is cut off. max(z, 0) is
// rounded to bfloat16 before the tail is subtracted; the reference rounds z itself.
template <typename T>
__device__ __forceinline__ typename PairOf<T>::type gelu_packed(float x, float y) {
    return __floats2half2_rn(gelu_for_16_bit(x), gelu_for_16_bit(y));
}
template <>
__device__ __forceinline__ __nv_bfloat162 gelu_packed<__nv_bfloat16>(float x, float y) {
    const auto both = [](float v) { return __floats2half2_rn(v, v); };
    const __half2 a = __hmin2(__habs2(__floats2half2_rn(x, y)), both(4.671875f));
    __half2 p = both(-0.000492039078f);
    p = __hfma2(p, a, both(0.00284302421f));
    p = __hfma2(p, a, both(0.00850718468f));
    p = __hfma2(p, a, both(-0.054660406f));
    p = __hfma2(p, a, both(-0.16584681f));
    p = __hfma2(p, a, both(0.841110587f));
    const __half2 square = __hmul2(p, p), tail = __hmul2(__hmul2(square, a), square);
    const __nv_bfloat162 minus = __floats2bfloat162_rn(-0x1p112f, -0x1p112f);
    return __hfma2(as_small_bfloat16(tail), minus, positive_parts(x, y));
}

// 2^v; a result too small for a normal number is zero.
__device__ __forceinline__ float power_of_two(float v) {
#ifdef __CUDACC__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
#else
    return exp2f(v);
#endif
}

// Phi(-a) is 2 to a polynomial, the one of kernels/tiles.py. Below zero the derivative is a sum of small numbers,
// never a difference from 1/2: its error there is 7e-8, what PyTorch's is, and 1.5e-7 above zero.
__device__ __forceinline__ float gelu_grad(float z) {
    const float a = magnitude_to_six(z);
    float p = -2.27609089e-06f;
    p = fmaf(p, a, 3.29706497e-05f);
    p = fmaf(p, a, -0.000157291496f);
    p = fmaf(p, a, -0.000202447236f);
    p = fmaf(p, a, 0.00714273809f);
    p = fmaf(p, a, -0.0525464029f);
    p = fmaf(p, a, -0.45919307f);
    p = fmaf(p, a, -1.15110694f);
    const float tail = power_of_two(fmaf(p, a, -0.999999959f));
    const float density = power_of_two(fmaf(z * z, -0.72134752f, -1.32574806f));
    return fmaf(z, density, z < 0.0f ? tail : 1.0f - tail);
}

// The derivative for 16-bit results, two at a time. For bfloat16 in float16 throughout: |GELU'(z) - 1/2| is a
// polynomial of degree 8 in min(|z|, 4) / 2 - 1, its largest error 1.4e-3 with the rounding of every step, a third of
// bfloat16's rounding near 1.
template <typename T>
__device__ __forceinline__ float2 gelu_grad_pair(float x, float y) {
    return {gelu_grad_for_16_bit(x), gelu_grad_for_16_bit(y)};
}
template <>
__device__ __forceinline__ float2 gelu_grad_pair<__nv_bfloat16>(float x, float y) {
    const auto both = [](float v) { return __floats2half2_rn(v, v); };
    const __half2 z = __floats2half2_rn(x, y);
    const __half2 a = __hfma2(__hmin2(__habs2(z), both(4.0f)), both(0.5f), both(-1.0f));
    __half2 p = both(-0.110069792f);
    p = __hfma2(p, a, both(-0.0562935710f));
    p = __hfma2(p, a, both(0.488220366f));
    p = __hfma2(p, a, both(-0.0949154829f));
    p = __hfma2(p, a, both(-0.711824695f));
    p = __hfma2(p, a, both(0.620105497f));
    p = __hfma2(p, a, both(-0.00133659773f));
    p = __hfma2(p, a, both(-0.218962699f));
    p = __hfma2(p, a, both(0.585262661f));
    uint32_t bits, signs;
    memcpy(&bits, &p, sizeof bits);
    memcpy(&signs, &z, sizeof signs);
    bits ^= signs & 0x80008000u;
    memcpy(&p, &bits, sizeof bits);
    return __half22float2(__hfma2(p, both(1.0f), both(0.5f)));
}

}  // namespace focalnet::cuda
