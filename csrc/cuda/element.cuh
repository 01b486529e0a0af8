// The three element types, and how they travel: alone, in pairs (shared memory) and in vectors of up to 16 bytes
// (global memory). Arithmetic is float32, except for that of pairs (PairOf).

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace focalnet::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
    return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
    return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}

// Two neighbouring channels in shared memory, aligned to their size.
__device__ __forceinline__ float2 load_pair(const float* p) { return *reinterpret_cast<const float2*>(p); }
__device__ __forceinline__ float2 load_pair(const __half* p) {
    return __half22float2(*reinterpret_cast<const __half2*>(p));
}
__device__ __forceinline__ float2 load_pair(const __nv_bfloat16* p) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(p));
}

__device__ __forceinline__ void store_pair(float* p, float2 v) { *reinterpret_cast<float2*>(p) = v; }
__device__ __forceinline__ void store_pair(__half* p, float2 v) {
    *reinterpret_cast<__half2*>(p) = __floats2half2_rn(v.x, v.y);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* p, float2 v) {
    *reinterpret_cast<__nv_bfloat162*>(p) = __floats2bfloat162_rn(v.x, v.y);
}

// A pair as it lies in shared memory, and its arithmetic: one instruction, rounded once.
template <typename T>
struct PairOf;
template <>
struct PairOf<__half> {
    using type = __half2;
    static __device__ __forceinline__ type from(float x, float y) { return __floats2half2_rn(x, y); }
    static __device__ __forceinline__ float2 floats(type pair) { return __half22float2(pair); }
};
template <>
struct PairOf<__nv_bfloat16> {
    using type = __nv_bfloat162;
    static __device__ __forceinline__ type from(float x, float y) { return __floats2bfloat162_rn(x, y); }
    static __device__ __forceinline__ float2 floats(type pair) { return __bfloat1622float2(pair); }
};

template <int BYTES>
struct RawOf;
template <>
struct RawOf<16> {
    using type = uint4;
};
template <>
struct RawOf<8> {
    using type = uint2;
};
template <>
struct RawOf<4> {
    using type = unsigned int;
};
template <>
struct RawOf<2> {
    using type = unsigned short;
};

// N channels of a map in global memory, in one access: N * sizeof(T) bytes, aligned to that many.
template <typename T, int N>
struct Vector {
    using Raw = typename RawOf<N * sizeof(T)>::type;

    static __device__ __forceinline__ Raw read(const T* from) { return *reinterpret_cast<const Raw*>(from); }

    static __device__ __forceinline__ void unpack(const Raw& raw, float (&to)[N]) {
        T values[N];
        memcpy(values, &raw, sizeof raw);
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = to_float(values[i]);
    }

    static __device__ __forceinline__ void load(const T* from, float (&to)[N]) { unpack(read(from), to); }

    static __device__ __forceinline__ void store(T* to, const float (&from)[N]) {
        T values[N];
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = from_float<T>(from[i]);
        Raw raw;
        memcpy(&raw, values, sizeof raw);
        *reinterpret_cast<Raw*>(to) = raw;
    }
};

// N channels of a plane in shared memory: pairs, since a plane's rows are only aligned to pairs.
template <typename T, int N>
__device__ __forceinline__ void load_shared(const T* from, float (&to)[N]) {
    if constexpr (N == 1) {
        to[0] = to_float(from[0]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const float2 pair = load_pair(from + i);
            to[i] = pair.x;
            to[i + 1] = pair.y;
        }
    }
}

template <typename T, int N>
__device__ __forceinline__ void store_shared(T* to, const float (&from)[N]) {
    if constexpr (N == 1) {
        to[0] = from_float<T>(from[0]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 2) store_pair(to + i, {from[i], from[i + 1]});
    }
}

}  // namespace focalnet::cuda
