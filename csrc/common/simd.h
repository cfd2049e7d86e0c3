// Vectors of floats as wide as the instruction set that a file is compiled for, over the vector
// extensions of GCC and Clang; intrinsics only where the compilers generate poor code for those.
//
// A kernel is compiled once per instruction set. Define HUNYUAN_FAST_ISA (plain, avx2 or avx512)
// before including this header: it names the inner namespace, so that the linker cannot merge an
// AVX-512 body with the plain one. For the same reason such files use no templates of the standard
// library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef HUNYUAN_FAST_ISA
#error "define HUNYUAN_FAST_ISA before including common/simd.h"
#endif

namespace hunyuan_fast::HUNYUAN_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(kLanes * 2)));

// What a row holds in memory; arithmetic is in float, whatever it is.
struct Float32 {
    using Storage = float;
};
struct BFloat16 {
    using Storage = uint16_t;
};
struct Float16 {
    using Storage = uint16_t;
};

template <class V, class T>
inline V load_as(T const* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V, class T>
inline void store_as(T* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

#if defined(__AVX512F__)
// The zero-masked forms: for the others g++ 12 warns of an uninitialised value in its own header.
constexpr __mmask16 kAll = 0xffff;
inline VecBits widen(VecHalf half) { return (VecBits)_mm512_maskz_cvtepu16_epi32(kAll, (__m256i)half); }
inline VecHalf narrow(VecBits bits) { return (VecHalf)_mm512_maskz_cvtepi32_epi16(kAll, (__m512i)bits); }
inline VecBits quiet(VecBits rounded, Vec v) {
    __mmask16 const is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    return (VecBits)_mm512_mask_or_epi32((__m512i)rounded, is_nan, (__m512i)v, _mm512_set1_epi32(0x400000));
}
inline Vec from_half(VecHalf half) { return (Vec)_mm512_maskz_cvtph_ps(kAll, (__m256i)half); }
inline VecHalf to_half(Vec v) {
    return (VecHalf)_mm512_maskz_cvtps_ph(kAll, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
// `rounded`, or in the lanes where v is NaN a quiet NaN of the same payload.
inline VecBits quiet(VecBits rounded, Vec v) {
    VecBits const is_nan = (VecBits)(v != v);
    return (rounded & ~is_nan) | (((VecBits)v | 0x400000u) & is_nan);
}
#if defined(__AVX2__)
inline VecBits widen(VecHalf half) { return (VecBits)_mm256_cvtepu16_epi32((__m128i)half); }
inline VecHalf narrow(VecBits bits) {
    __m256i const packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
    return (VecHalf)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
inline Vec from_half(VecHalf half) { return (Vec)_mm256_cvtph_ps((__m128i)half); }
inline VecHalf to_half(Vec v) { return (VecHalf)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
inline VecBits widen(VecHalf half) { return __builtin_convertvector(half, VecBits); }
inline VecHalf narrow(VecBits bits) { return __builtin_convertvector(bits, VecHalf); }

inline float half_lane(uint16_t half) {
    uint32_t const sign = uint32_t(half & 0x8000u) << 16;
    uint32_t const exponent = (half >> 10) & 0x1fu;
    uint32_t const mantissa = half & 0x3ffu;
    float const subnormal = float(mantissa) * 0x1p-24f;
    uint32_t bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    if (exponent == 0x1fu) bits = sign | 0x7f800000u | (mantissa << 13);
    if (exponent == 0) bits = sign | load_as<uint32_t>(&subnormal);
    return load_as<float>(&bits);
}

inline uint16_t to_half_lane(float value) {
    uint32_t const bits = load_as<uint32_t>(&value);
    uint32_t const magnitude = bits & 0x7fffffffu;
    uint16_t const sign = uint16_t((bits >> 16) & 0x8000u);
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
        // No normal half: adding 1/2 rounds to a multiple of 2^-24 and leaves it in the low bits.
        float const shifted = load_as<float>(&magnitude) + 0.5f;
        return uint16_t(sign | (load_as<uint32_t>(&shifted) - 0x3f000000u));
    }
    return uint16_t(sign | ((magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13));
}

inline Vec from_half(VecHalf half) {
    Vec v{};
    for (int i = 0; i < kLanes; ++i) v[i] = half_lane(half[i]);
    return v;
}
inline VecHalf to_half(Vec v) {
    VecHalf half{};
    for (int i = 0; i < kLanes; ++i) half[i] = to_half_lane(v[i]);
    return half;
}
#endif
#endif

inline Vec load(Float32, float const* p) { return load_as<Vec>(p); }
inline Vec load(Float16, uint16_t const* p) { return from_half(load_as<VecHalf>(p)); }
inline Vec load(BFloat16, uint16_t const* p) { return (Vec)(widen(load_as<VecHalf>(p)) << 16); }

inline void store(Float32, float* p, Vec v) { store_as(p, v); }
inline void store(Float16, uint16_t* p, Vec v) { store_as(p, to_half(v)); }
// To nearest even on the bits: the bfloat16 instructions would flush denormals.
inline void store(BFloat16, uint16_t* p, Vec v) {
    VecBits const bits = (VecBits)v;
    store_as(p, narrow(quiet(bits + 0x7fffu + ((bits >> 16) & 1u), v) >> 16));
}

// The last `count` < kLanes elements of a row: the other lanes read as zero and are not written.
template <class T>
inline Vec load_tail(T type, typename T::Storage const* p, int64_t count) {
    typename T::Storage lanes[kLanes] = {};
    std::memcpy(lanes, p, size_t(count) * sizeof *p);
    return load(type, lanes);
}

template <class T>
inline void store_tail(T type, typename T::Storage* p, Vec v, int64_t count) {
    typename T::Storage lanes[kLanes];
    store(type, lanes, v);
    std::memcpy(p, lanes, size_t(count) * sizeof *p);
}

// Zero in every lane from `count` on.
inline Vec keep_lanes(Vec v, int64_t count) {
    VecInt lane{};
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return (Vec)((VecInt)v & (lane < (VecInt{} + int32_t(count))));
}

inline double sum_lanes(Vec v) {
    double lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = double(v[i]);
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

}  // namespace hunyuan_fast::HUNYUAN_FAST_ISA
