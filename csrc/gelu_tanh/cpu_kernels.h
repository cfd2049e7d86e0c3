// The kernels for a CPU, compiled once per instruction set by cpu_<isa>.cpp.
//
// With t = 2 u the logistic function is 1 / (1 + e^-t), and e^-t = 2^(-t log2 e) a power of two whose
// exponent is w (A + B w^2). Beyond |x| = 12 it is infinite or zero in fp32, so w is x held within 12.
#pragma once

#include "common/simd_math.h"
#include "common/simd_pair.h"
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

// f of every element, past the caches where that is wanted and the part begins where it can.
template <class T, class F, class... Inputs>
inline void map(T type, F f, int64_t count, typename T::Storage* result, bool streams, Inputs const*... inputs) {
    bool const aligned = reinterpret_cast<uintptr_t>(result) % kStreamAlignment == 0;
    auto const each = [&](auto... v) { return Pair{f(v.a...), f(v.b...)}; };
    for_each_pair(count, [&](int64_t i, int, auto elements) {
        write(type, result + i, each(load(type, inputs + i, elements)...), elements, streams && aligned);
    });
}

template <class T>
void forward(ForwardParams const& p, int64_t begin, int64_t end) {
    for_each_part(p.grid, begin, end, [&](int64_t row, int64_t column, int64_t count) {
        auto const* x = at<T>(p.grid, p.x, row, column);
        map(T(), [](Vec v) { return gelu<T>(v); }, count, at<T>(p.grid, p.y, row, column), p.streams, x);
    });
    if (p.streams) finish_streams();
}

template <class T>
void backward(BackwardParams const& p, int64_t begin, int64_t end) {
    for_each_part(p.grid, begin, end, [&](int64_t row, int64_t column, int64_t count) {
        auto const* dy = at<T>(p.grid, p.dy, row, column);
        auto const* x = at<T>(p.grid, p.x, row, column);
        auto const product = [](Vec d, Vec v) { return d * gelu_slope<T>(v); };
        map(T(), product, count, at<T>(p.grid, p.dx, row, column), p.streams, dy, x);
    });
    if (p.streams) finish_streams();
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
