// Eight-bit numbers on the emulated machine: the names of csrc/common/sm90_e4m3.cuh.
#pragma once

#include <cmath>

#include "common/sm90.cuh"

namespace hunyuan_fast::sm90 {

// Sign, four bits of exponent, three of mantissa; no infinities, and NaN is all ones.
inline uint32_t e4m3(float x) {
    if (std::isnan(x)) return 0x7f;
    uint32_t const sign = std::signbit(x) ? 0x80 : 0;
    float const size = std::fmin(std::fabs(x), 448.0f);
    if (size < std::ldexp(1.0f, -6)) return sign | uint32_t(std::nearbyint(size * 512));
    int exponent;
    float const half = std::frexp(size, &exponent);  // 0.5 to 1
    // eighths above the power of two; 16 of them are the next one
    return sign | uint32_t(int(std::nearbyint(half * 16)) - 8 + 8 * (exponent + 6));
}

inline uint32_t pack_e4m3(float a, float b, float c, float d) {
    return e4m3(a) | e4m3(b) << 8 | e4m3(c) << 16 | e4m3(d) << 24;
}

}  // namespace hunyuan_fast::sm90
