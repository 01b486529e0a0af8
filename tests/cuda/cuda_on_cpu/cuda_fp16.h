// float16 for g++: the conversions that csrc/cuda uses, rounding to nearest even.

#pragma once

#include "cuda_runtime.h"

struct __half {
    _Float16 value;
};
struct alignas(4) __half2 {
    __half x, y;
};

inline float __half2float(__half v) { return static_cast<float>(v.value); }
inline __half __float2half_rn(float v) { return {static_cast<_Float16>(v)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    const auto fma = [](__half x, __half y, __half z) {
        return __float2half_rn(std::fma(__half2float(x), __half2float(y), __half2float(z)));
    };
    return {fma(a.x, b.x, c.x), fma(a.y, b.y, c.y)};
}
inline __half2 __hmul2(__half2 a, __half2 b) {
    return {__float2half_rn(__half2float(a.x) * __half2float(b.x)), __float2half_rn(__half2float(a.y) * __half2float(b.y))};
}
inline __half2 __habs2(__half2 v) {
    return {__float2half_rn(std::fabs(__half2float(v.x))), __float2half_rn(std::fabs(__half2float(v.y)))};
}
// The other operand where one is NaN.
inline __half2 __hmin2(__half2 a, __half2 b) {
    return {__float2half_rn(std::fmin(__half2float(a.x), __half2float(b.x))),
            __float2half_rn(std::fmin(__half2float(a.y), __half2float(b.y)))};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
