// Numbers of 8 and 16 bits, from and to fp32: round to nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine/machine.h"

namespace hopper {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float bf16_to_float(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

inline uint16_t float_to_bf16(float value) {
    uint32_t const bits = bits_of(value);
    if (std::isnan(value)) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Of `exponent` bits with this bias and `mantissa` ones below; not for infinities.
inline float small_to_float(uint32_t bits, int exponent, int mantissa, int bias) {
    auto const power = int(bits >> mantissa & ((1u << exponent) - 1));
    uint32_t const rest = bits & ((1u << mantissa) - 1);
    float const sign = bits >> (exponent + mantissa) & 1 ? -1.0f : 1.0f;
    if (power == 0) return sign * std::ldexp(float(rest), 1 - bias - mantissa);
    return sign * std::ldexp(float(rest | 1u << mantissa), power - bias - mantissa);
}

// Rounds a finite number to the spacing of such a format; the caller sees to what is too large.
inline float round_to_small(float value, int mantissa, int bias) {
    int power;
    std::frexp(value, &power);
    int const step = std::max(power - 1, 1 - bias) - mantissa;
    return std::ldexp(std::nearbyint(std::ldexp(value, -step)), step);
}

// Bits of a number that the format holds.
inline uint32_t float_to_small(float value, int exponent, int mantissa, int bias) {
    uint32_t const sign = bits_of(value) >> 31 << (exponent + mantissa);
    value = std::fabs(value);
    if (value < std::ldexp(1.0f, 1 - bias)) return sign | uint32_t(std::ldexp(value, bias - 1 + mantissa));
    int power;
    float const fraction = std::frexp(value, &power);
    auto const rest = uint32_t(std::ldexp(fraction, mantissa + 1)) & ((1u << mantissa) - 1);
    return sign | uint32_t(power - 1 + bias) << mantissa | rest;
}

inline float half_to_float(uint16_t bits) {
    if ((bits & 0x7c00) != 0x7c00) return small_to_float(bits, 5, 10, 15);
    if (bits & 0x3ff) return NAN;
    return bits >> 15 ? -INFINITY : INFINITY;
}

inline uint16_t float_to_half(float value) {
    if (std::isnan(value)) return 0x7fff;
    uint16_t const sign = uint16_t(bits_of(value) >> 16 & 0x8000);
    float const rounded = std::isinf(value) ? value : round_to_small(value, 10, 15);
    if (std::fabs(rounded) > 65504.0f) return sign | 0x7c00;
    return sign | uint16_t(float_to_small(std::fabs(rounded), 5, 10, 15));
}

// 4 bits of exponent, 3 below, no infinities: what is too large becomes the largest.
inline float e4m3_to_float(uint8_t bits) {
    return (bits & 0x7f) == 0x7f ? NAN : small_to_float(bits, 4, 3, 7);
}

inline uint8_t float_to_e4m3(float value) {
    if (std::isnan(value)) return 0x7f;
    uint8_t const sign = uint8_t(bits_of(value) >> 24 & 0x80);
    float const rounded = std::isinf(value) ? 448.0f : round_to_small(std::fabs(value), 3, 7);
    return sign | uint8_t(float_to_small(std::fmin(rounded, 448.0f), 4, 3, 7));
}

// Tables: conversions bit by bit are slow.
inline float const* half_table() {
    static float* const table = [] {
        auto* const made = new float[1 << 16];
        for (uint32_t bits = 0; bits < 1 << 16; ++bits) made[bits] = half_to_float(uint16_t(bits));
        return made;
    }();
    return table;
}

inline float const* e4m3_table() {
    static float* const table = [] {
        auto* const made = new float[256];
        for (uint32_t bits = 0; bits < 256; ++bits) made[bits] = e4m3_to_float(uint8_t(bits));
        return made;
    }();
    return table;
}

inline float widened(Number number, uint32_t bits) {
    if (number == Number::bf16) return bf16_to_float(uint16_t(bits));
    if (number == Number::f16) return half_table()[uint16_t(bits)];
    return e4m3_table()[uint8_t(bits)];
}

// 16 bytes of them.
inline void widen_chunk(Number number, char const* from, float* to) {
    if (number == Number::e4m3) {
        for (int i = 0; i < 16; ++i) to[i] = e4m3_table()[uint8_t(from[i])];
        return;
    }
    uint16_t bits[8];
    std::memcpy(bits, from, sizeof bits);
    for (int i = 0; i < 8; ++i) to[i] = widened(number, bits[i]);
}

}  // namespace hopper
