// Elementary functions on the vectors of simd.h.
#pragma once

#include "common/simd.h"

namespace hunyuan_fast::HUNYUAN_FAST_ISA {

// v, but not below (above) a limit; NaN stays NaN.
#if defined(__AVX512F__)
// These instructions return their last operand where either is NaN.
inline Vec at_least(Vec v, float limit) {
    return (Vec)_mm512_maskz_max_ps(kAll, _mm512_set1_ps(limit), (__m512)v);
}
inline Vec at_most(Vec v, float limit) {
    return (Vec)_mm512_maskz_min_ps(kAll, _mm512_set1_ps(limit), (__m512)v);
}
#elif defined(__AVX2__)
inline Vec at_least(Vec v, float limit) { return (Vec)_mm256_max_ps(_mm256_set1_ps(limit), (__m256)v); }
inline Vec at_most(Vec v, float limit) { return (Vec)_mm256_min_ps(_mm256_set1_ps(limit), (__m256)v); }
#else
inline Vec at_least(Vec v, float limit) { return v < limit ? Vec{} + limit : v; }
inline Vec at_most(Vec v, float limit) { return v > limit ? Vec{} + limit : v; }
#endif

inline Vec absolute(Vec v) { return (Vec)((VecBits)v & 0x7fffffffu); }

// 2^n for integers n in [-126, 127], by its exponent bits.
inline Vec power_of_two(VecInt n) { return (Vec)(((VecBits)n + 127u) << 23); }

// 2^(a b) for |a b| <= 250, or NaN: of the rounded product within an ulp; zero, subnormal or infinite where
// that is. For results of 16 bits one term less is enough, and the error two ulps. The factors come apart
// because the fraction of their product is then exact: it takes one fused operation where there is one.
//
// a b = n + f with n whole and |f| <= 1/2; 2^f = 1 + f q(f), where q was fitted to the relative error of 2^f:
// 3e-9 with these coefficients, 1e-7 with one less. 2^0 is exactly 1.
template <bool kFor16Bits>
inline Vec exp2_of_product(Vec a, Vec b) {
    float const magic = 0x1.8p23f;  // a float of this size has no fraction bits: adding it rounds
    Vec const shifted = a * b + magic;
    Vec const n = shifted - magic;
    Vec const f = a * b - n;
    Vec p;
    if (kFor16Bits) {
        p = f * 0x1.5ca826p-10f + 0x1.3cdafep-7f;
        p = p * f + 0x1.c6b3aap-5f;
        p = p * f + 0x1.ebf9f2p-3f;
    } else {
        p = f * 0x1.417abap-13f + 0x1.5f094ap-10f;
        p = p * f + 0x1.3b2dd2p-7f;
        p = p * f + 0x1.c6af7ap-5f;
        p = p * f + 0x1.ebfbdcp-3f;
    }
    p = p * f + 0x1.62e430p-1f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_scalef_ps(kAll, (__m512)p, (__m512)n);
#else
    // In two steps: n may lie outside of the exponents of a float.
    VecBits const whole = (VecBits)shifted - (VecBits)(Vec{} + magic);
    VecInt const half = (VecInt)whole >> 1;
    return p * power_of_two(half) * power_of_two((VecInt)(whole - (VecBits)half));
#endif
}

constexpr float kLog2E = 1.4426950408889634f;
// e^-z is infinite or zero in fp32 beyond it.
constexpr float kExpBound = 120.0f;

// z / (1 + e^-z).
template <bool kFor16Bits>
inline Vec silu(Vec z) {
    // As numerator, so that -inf gives -120 / inf.
    Vec const low = at_least(z, -kExpBound);
    return low / (1.0f + exp2_of_product<kFor16Bits>(at_most(low, kExpBound), Vec{} - kLog2E));
}

}  // namespace hunyuan_fast::HUNYUAN_FAST_ISA
