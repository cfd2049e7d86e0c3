// CUDA's fp16.
#pragma once

#include "cuda_runtime.h"
#include "machine/numbers.h"

struct __half {
    uint16_t bits;

    __half() = default;
    __half(float value) : bits(hopper::float_to_half(value)) {}
    operator float() const { return hopper::half_table()[bits]; }
};

struct alignas(4) __half2 {
    __half x, y;
};

inline __half __float2half(float value) { return {value}; }
inline __half __float2half_rn(float value) { return {value}; }
inline float __half2float(__half value) { return value; }
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
inline __half2 __float22half2_rn(float2 pair) { return {pair.x, pair.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
