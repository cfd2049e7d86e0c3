// The kernels for a CPU, compiled once per instruction set by cpu_<isa>.cpp.
//
// With t = 2 u the logistic function is 1 / (1 + e^-t), and e^-t = 2^(-t log2 e) a power of two whose
// exponent is w (A + B w^2). Beyond |x| = 12 it is infinite or zero in fp32, so w is x held within 12.
#pragma once

#include "common/simd_math.h"
#include "gelu_tanh/cpu.h"

namespace hunyuan_fast::gelu_tanh::HUNYUAN_FAST_ISA {

using namespace hunyuan_fast::HUNYUAN_FAST_ISA;

constexpr double kCubic = 0.044715;
constexpr double kSlope = 1.5957691216057308;              // 2 sqrt(2 / pi): dt/dx at zero
constexpr double kA = kSlope * 1.4426950408889634;         // times log2(e)
constexpr double kB = kA * kCubic;
constexpr float kBound = 12.0f;

template <class T>
constexpr bool kOf16Bits = sizeof(typename T::Storage) == 2;

template <class T>
inline Vec gelu(Vec x) {
    // As numerator, so that -inf gives -12 / inf.
    Vec const low = at_least(x, -kBound);
    Vec const w = at_most(low, kBound);
    Vec const e = exp2_of_product<kOf16Bits<T>>(w, w * w * float(-kB) + float(-kA));
    return low / (1.0f + e);
}

// The derivative, with s = 1 / (1 + e^-|t|) and c = 1 - s, neither of which cancels: s + q for x >= 0 and
// c - q for x < 0, where q = |x| t' s c.
template <class T>
inline Vec gelu_slope(Vec x) {
    Vec const w = at_most(absolute(x), kBound);
    Vec const square = w * w;
    Vec const e = exp2_of_product<kOf16Bits<T>>(w, square * float(-kB) + float(-kA));
    Vec const s = 1.0f / (1.0f + e);
    Vec const c = e * s;
    Vec const q = w * (square * float(3 * kSlope * kCubic) + float(kSlope)) * c * s;
    return x < 0.0f ? c - q : s + q;
}

// Calls body(row, column, count) for the parts of rows that make up the elements [begin, end).
template <class Body>
inline void for_each_part(Grid const& grid, int64_t begin, int64_t end, Body body) {
    int64_t row = begin / grid.width;
    int64_t column = begin - row * grid.width;
    while (begin < end) {
        int64_t const rest = grid.width - column;
        int64_t const count = rest < end - begin ? rest : end - begin;
        body(row, column, count);
        begin += count;
        column = 0;
        ++row;
    }
}

template <class T>
inline typename T::Storage* at(Grid const& grid, Rows const& rows, int64_t row, int64_t column) {
    return static_cast<typename T::Storage*>(rows.data) + offset_of(grid, rows, row) + column;
}

// Pairs of bfloat16 that lie in one word each: taken apart and joined by shifts within the words, which are
// cheaper than moving lanes. Rounded to nearest even on the bits; NaN needs no care, because those that come
// of bfloat16 have no bits set below.
inline Vec lower(VecBits words) { return (Vec)(words << 16); }
inline Vec upper(VecBits words) { return (Vec)(words & 0xffff0000u); }
#if defined(__AVX512F__)
inline VecBits rounded(VecBits bits) {
    __m512i const up = (__m512i)(bits + 0x7fffu);
    __mmask16 const odd = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000));
    return (VecBits)_mm512_mask_sub_epi32(up, odd, up, _mm512_set1_epi32(-1));
}
#else
inline VecBits rounded(VecBits bits) { return bits + 0x7fffu + ((bits >> 16) & 1u); }
#endif
inline VecBits joined(Vec low, Vec high) {
    return (rounded((VecBits)low) >> 16) | (rounded((VecBits)high) & 0xffff0000u);
}

// result[i] = f(inputs[i]...) for i < count.
template <class T, class F, class... Inputs>
inline void map(T type, F f, int64_t count, typename T::Storage* result, Inputs const*... inputs) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(type, result + i, f(load(type, inputs + i)...));
    if (i < count) store_tail(type, result + i, f(load_tail(type, inputs + i, count - i)...), count - i);
}

template <class F, class... Inputs>
inline void map(BFloat16 type, F f, int64_t count, uint16_t* result, Inputs const*... inputs) {
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        Vec const low = f(lower(load_as<VecBits>(inputs + i))...);
        Vec const high = f(upper(load_as<VecBits>(inputs + i))...);
        store_as(result + i, joined(low, high));
    }
    for (; i + kLanes <= count; i += kLanes) store(type, result + i, f(load(type, inputs + i)...));
    if (i < count) store_tail(type, result + i, f(load_tail(type, inputs + i, count - i)...), count - i);
}

template <class T>
void forward(ForwardParams const& p, int64_t begin, int64_t end) {
    for_each_part(p.grid, begin, end, [&](int64_t row, int64_t column, int64_t count) {
        auto const* x = at<T>(p.grid, p.x, row, column);
        map(T(), [](Vec v) { return gelu<T>(v); }, count, at<T>(p.grid, p.y, row, column), x);
    });
}

template <class T>
void backward(BackwardParams const& p, int64_t begin, int64_t end) {
    for_each_part(p.grid, begin, end, [&](int64_t row, int64_t column, int64_t count) {
        auto const* dy = at<T>(p.grid, p.dy, row, column);
        auto const* x = at<T>(p.grid, p.x, row, column);
        auto const product = [](Vec d, Vec v) { return d * gelu_slope<T>(v); };
        map(T(), product, count, at<T>(p.grid, p.dx, row, column), dy, x);
    });
}

template <class T>
constexpr CpuKernels kKernels = {&forward<T>, &backward<T>};

inline CpuKernels const& kernels_of(DType dtype) {
    switch (dtype) {
        case DType::f16: return kKernels<Float16>;
        case DType::bf16: return kKernels<BFloat16>;
        default: return kKernels<Float32>;
    }
}

}  // namespace hunyuan_fast::gelu_tanh::HUNYUAN_FAST_ISA
