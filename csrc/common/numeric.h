// 16-bit floats as storage: widened to float32 on load, rounded to nearest even once on store.
#pragma once

#include <cstdint>
#include <cstring>

namespace hunyuan_fast {

struct bf16 {
    uint16_t bits;
};

static inline float to_float(float value) { return value; }

static inline float to_float(bf16 value) {
    uint32_t const bits = static_cast<uint32_t>(value.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

template <class T>
static inline T from_float(float value);

template <>
inline float from_float<float>(float value) {
    return value;
}

template <>
inline bf16 from_float<bf16>(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // rounding would carry a NaN's mantissa into infinity
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

}  // namespace hunyuan_fast
