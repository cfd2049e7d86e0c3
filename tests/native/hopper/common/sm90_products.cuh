// The functions of csrc/common/sm90_products.cuh, done by the emulated machine.
#pragma once

#include "common/sm90.cuh"

namespace hunyuan_fast::sm90 {

template <int N>
constexpr bool kIsColumns = N == 64 || N == 80 || N == 96 || N == 128 || N == 176 || N == 192 || N == 256;

template <class T>
constexpr hopper::Number number_of() {
    static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
    return std::is_same_v<T, __half> ? hopper::Number::f16 : hopper::Number::bf16;
}

template <class T, int N, Major B = Major::K, Major A = Major::K>
void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    static_assert(kIsColumns<N>);
    hopper::multiply({number_of<T>(), N, A == Major::MN, B == Major::MN, a, b, nullptr, d, accumulate != 0});
}

template <class T, int N, Major B = Major::K>
void multiply(float (&d)[N / 2], uint32_t const (&a)[4], uint64_t b, int accumulate) {
    static_assert(kIsColumns<N>);
    hopper::multiply({number_of<T>(), N, false, B == Major::MN, 0, b, a, d, accumulate != 0});
}

template <int N>
void multiply_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    static_assert(kIsColumns<N>);
    hopper::multiply({hopper::Number::e4m3, N, false, false, a, b, nullptr, d, accumulate != 0});
}

template <int N>
void multiply_e4m3(float (&d)[N / 2], uint32_t const (&a)[4], uint64_t b, int accumulate) {
    static_assert(kIsColumns<N>);
    hopper::multiply({hopper::Number::e4m3, N, false, false, 0, b, a, d, accumulate != 0});
}

}  // namespace hunyuan_fast::sm90
