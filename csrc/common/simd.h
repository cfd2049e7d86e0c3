// Vectors of floats as wide as the instruction set a file is compiled for, over GCC and Clang
// vector extensions.
//
// A kernel file is compiled once per instruction set.  Define HUNYUAN_FAST_ISA before including this
// header: it names the inner namespace, so that the linker cannot merge an AVX-512 body with the
// portable one.  For the same reason such files must not use templates of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef HUNYUAN_FAST_ISA
#error "define HUNYUAN_FAST_ISA (avx512, avx2 or portable) before including common/simd.h"
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
typedef int32_t VecMask __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(kLanes * 2)));

// What a row in memory holds; arithmetic is always in float.
struct Float32 {
  using Storage = float;
};
struct BFloat16 {
  using Storage = uint16_t;
};
struct Float16 {
  using Storage = uint16_t;
};

inline Vec broadcast(float value) { return Vec{} + value; }

inline Vec load(Float32, float const* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(Float32, float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

inline Vec load(BFloat16, uint16_t const* p) {
  VecHalf half;
  std::memcpy(&half, p, sizeof(half));
  return (Vec)(__builtin_convertvector(half, VecBits) << 16);
}

// Round to nearest even on the bits: vcvtneps2bf16 would flush denormals.
inline void store(BFloat16, uint16_t* p, Vec v) {
  VecBits const bits = (VecBits)v;
  VecBits const rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  VecBits const is_nan = (VecBits)(v != v);
  VecBits const result = (rounded & ~is_nan) | (((bits >> 16) | 0x40u) & is_nan);
  VecHalf const half = __builtin_convertvector(result, VecHalf);
  std::memcpy(p, &half, sizeof(half));
}

#if defined(__AVX512F__)
inline Vec load(Float16, uint16_t const* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(p)));
}

inline void store(Float16, uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__) && defined(__F16C__)
inline Vec load(Float16, uint16_t const* p) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(p)));
}

inline void store(Float16, uint16_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_from_half(uint16_t half) {
  uint32_t const sign = uint32_t(half & 0x8000u) << 16;
  uint32_t const exponent = (half >> 10) & 0x1fu;
  uint32_t const mantissa = half & 0x3ffu;
  if (exponent == 0x1fu) return float_from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return float_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  float const magnitude = float(mantissa) * 0x1p-24f;
  return float_from_bits(sign | bits_from_float(magnitude));
}

inline uint16_t half_from_float(float value) {
  uint32_t const bits = bits_from_float(value);
  uint16_t const sign = uint16_t((bits >> 16) & 0x8000u);
  uint32_t const magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Below the smallest normal half: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    return uint16_t(sign | (bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u));
  }
  uint32_t const rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}

inline Vec load(Float16, uint16_t const* p) {
  Vec v{};
  for (int i = 0; i < kLanes; ++i) v[i] = float_from_half(p[i]);
  return v;
}

inline void store(Float16, uint16_t* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = half_from_float(v[i]);
}
#endif

// The last `count` < kLanes elements of a row; the other lanes read as zero and are not written.
template <class T>
inline Vec load_tail(T type, typename T::Storage const* p, int64_t count) {
  typename T::Storage lanes[kLanes] = {};
  std::memcpy(lanes, p, size_t(count) * sizeof(*p));
  return load(type, lanes);
}

template <class T>
inline void store_tail(T type, typename T::Storage* p, Vec v, int64_t count) {
  typename T::Storage lanes[kLanes];
  store(type, lanes, v);
  std::memcpy(p, lanes, size_t(count) * sizeof(*p));
}

// Zero in every lane from `count` on.
inline Vec keep_lanes(Vec v, int64_t count) {
  VecMask lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return (Vec)((VecMask)v & (lane < int32_t(count)));
}

inline double sum_lanes(Vec v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += double(v[i]);
  return sum;
}

}  // namespace hunyuan_fast::HUNYUAN_FAST_ISA
