// The kernels for a CPU, compiled once per instruction set by cpu_<isa>.cpp.
//
// Sums are kept lane by lane over a chunk in fp32 and leave it as they are; everything beyond a chunk is double and
// not here (cpu.cpp).
#pragma once

#include "common/simd_math.h"
#include "common/simd_pair.h"
#include "group_norm_silu/cpu.h"

namespace hunyuan_fast::group_norm_silu::HUNYUAN_FAST_ISA {

using namespace hunyuan_fast::HUNYUAN_FAST_ISA;

// Part of a chunk that the centre is taken from. A mean of one value in eight lies within sqrt(8) deviations of that
// of all of them, whatever the values are: the squares about it lose three bits at most.
constexpr int64_t kCentreShare = 8;

template <class T>
constexpr bool kOf16Bits = sizeof(typename T::Storage) == 2;

// The derivative, with s = 1 / (1 + e^-|z|) and c = 1 - s, neither of which cancels.
template <class T>
inline Vec silu_slope(Vec z) {
    Vec const w = at_most(absolute(z), kExpBound);
    Vec const e = exp2_of_product<kOf16Bits<T>>(w, Vec{} - kLog2E);
    Vec const s = 1.0f / (1.0f + e);
    Vec const c = e * s;
    Vec const q = w * c * s;
    return z < 0.0f ? c - q : s + q;
}

// The values of one chunk.
struct Stretch {
    int64_t b, begin, count;
};

inline Stretch stretch(Sizes const& sizes, int64_t chunk) {
    int64_t const b = chunk / sizes.chunks, begin = chunk % sizes.chunks * sizes.chunk;
    int64_t const rest = sizes.values() - begin;
    return {b, begin, rest < sizes.chunk ? rest : sizes.chunk};
}

template <class T>
inline typename T::Storage* at(Maps const& maps, Stretch const& s) {
    return static_cast<typename T::Storage*>(maps.data) + s.b * maps.stride_b + s.begin;
}

// Calls body(value, lane, elements) for every pair of a stretch that starts with a period.
template <class Body>
inline void for_each_pair_of_periods(int64_t count, int64_t period, Body body) {
    int64_t start = 0;
    for (; start + period <= count; start += period) {
        for (int64_t e = 0; e < period; e += kPair) body(start + e, e, Whole{});
    }
    int64_t e = 0;
    for (; start + e + kPair <= count; e += kPair) body(start + e, e, Whole{});
    if (start + e < count) body(start + e, e, Part{count - start - e});
}

// A line of a sample, or of sums, in the order that the elements of a pair have.
struct Ordered {
    float* pairs;
    float* consecutive;

    float* at(int64_t e, Whole) const { return pairs + e; }
    float* at(int64_t e, Part) const { return consecutive + e; }
    template <class Elements>
    Pair load(int64_t e, Elements elements) const {
        return HUNYUAN_FAST_ISA::load(Float32{}, at(e, elements), elements);
    }
    template <class Elements>
    void add(int64_t e, Pair v, Elements elements) const {
        store(Float32{}, at(e, elements), load(e, elements) + v, elements);
    }
};

inline Ordered line(Lines const& lines, int64_t b, int which) {
    return {lines.of(b, 0, which), lines.of(b, 1, which)};
}

// The lines of both passes, and z.
struct Affine {
    Ordered centre, scale, shift;

    Affine(Lines const& lines, int64_t b)
        : centre(line(lines, b, kCentre)), scale(line(lines, b, kScale)), shift(line(lines, b, kShift)) {}

    template <class Elements>
    Pair operator()(Pair centred, int64_t e, Elements elements) const {
        return centred * scale.load(e, elements) + shift.load(e, elements);
    }
};

// Rooms of scratch memory as zeroed sums.
inline Ordered zeroed(float* room, int64_t period) {
    std::memset(room, 0, size_t(2 * period) * sizeof(float));
    return {room, room + period};
}

// The line in consecutive order, in the room of the other; what the end of a sample has added is there already.
template <class T>
inline float* folded(T type, Ordered const& sums, int64_t period) {
    for (int64_t e = 0; e < period; e += kPair) {
        Pair const v = unsplit(type, load(Float32{}, sums.pairs + e, Whole{}), Whole{});
        store(Float32{}, sums.consecutive + e, v + load(Float32{}, sums.consecutive + e, Whole{}), Whole{});
    }
    return sums.consecutive;
}

// Makes of the sums of some periods their means, in both orders. Less than a period is its own mean.
template <class T>
void centre_of(T type, Ordered const& centre, int64_t periods, int64_t period) {
    for (int64_t e = 0; periods > 0 && e < period; e += kPair) {
        Pair const mean = load(Float32{}, centre.pairs + e, Whole{}) * (1.0f / float(periods));
        store(Float32{}, centre.pairs + e, mean, Whole{});
        store(Float32{}, centre.consecutive + e, unsplit(type, mean, Whole{}), Whole{});
    }
}

template <class T>
Sums statistics(StatisticsParams const& p, int64_t chunk, float* room) {
    int64_t const period = p.sizes.period;
    Stretch const s = stretch(p.sizes, chunk);
    auto const* x = at<T>(p.x, s);
    Ordered const centre = zeroed(room, period), sum = zeroed(room + 2 * period, period),
                  squares = zeroed(room + 4 * period, period);
    int64_t const periods = s.count / period;
    int64_t const few = periods > kCentreShare ? periods / kCentreShare : periods > 0;
    for_each_pair_of_periods(periods > 0 ? few * period : s.count, period, [&](int64_t i, int64_t e, auto elements) {
        centre.add(e, load(T{}, x + i, elements), elements);
    });
    centre_of(T{}, centre, few, period);
    for_each_pair_of_periods(s.count, period, [&](int64_t i, int64_t e, auto elements) {
        Pair const c = load(T{}, x + i, elements) - centre.load(e, elements);
        sum.add(e, c, elements);
        squares.add(e, c * c, elements);
    });
    float* const about = periods > 0 ? centre.consecutive : folded(T{}, centre, period);
    return {about, folded(T{}, sum, period), folded(T{}, squares, period)};
}

template <class Storage>
inline bool aligned(Storage const* p) {
    return reinterpret_cast<uintptr_t>(p) % kStreamAlignment == 0;
}

template <class T, bool kSilu>
void forward(ForwardParams const& p, int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        Stretch const s = stretch(p.sizes, chunk);
        auto const* x = at<T>(p.x, s);
        auto* y = at<T>(p.y, s);
        bool const streams = p.streams && aligned(y);
        Affine const affine(p.lines, s.b);
        for_each_pair_of_periods(s.count, p.sizes.period, [&](int64_t i, int64_t e, auto elements) {
            Pair const c = load(T{}, x + i, elements) - affine.centre.load(e, elements);
            Pair const z = affine(c, e, elements);
            write(T{}, y + i, kSilu ? Pair{silu<kOf16Bits<T>>(z.a), silu<kOf16Bits<T>>(z.b)} : z, elements, streams);
        });
    }
    if (p.streams) finish_streams();
}

template <class T, bool kSilu, class Elements>
inline Pair through_silu(Pair dy, Pair c, Affine const& affine, int64_t e, Elements elements) {
    if constexpr (!kSilu) return dy;
    Pair const z = affine(c, e, elements);
    return {dy.a * silu_slope<T>(z.a), dy.b * silu_slope<T>(z.b)};
}

template <class T, bool kSilu>
Sums gradient_sums(BackwardParams const& p, int64_t chunk, float* room) {
    int64_t const period = p.sizes.period;
    Stretch const s = stretch(p.sizes, chunk);
    auto const* x = at<T>(p.x, s);
    auto const* dy = at<T>(p.dy, s);
    Affine const affine(p.lines, s.b);
    Ordered const sum = zeroed(room, period), product = zeroed(room + 2 * period, period);
    for_each_pair_of_periods(s.count, period, [&](int64_t i, int64_t e, auto elements) {
        Pair const c = load(T{}, x + i, elements) - affine.centre.load(e, elements);
        Pair const dz = through_silu<T, kSilu>(load(T{}, dy + i, elements), c, affine, e, elements);
        sum.add(e, dz, elements);
        product.add(e, dz * c, elements);
    });
    return {nullptr, folded(T{}, sum, period), folded(T{}, product, period)};
}

template <class T, bool kSilu>
void backward(BackwardParams const& p, int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        Stretch const s = stretch(p.sizes, chunk);
        auto const* x = at<T>(p.x, s);
        auto const* dy = at<T>(p.dy, s);
        auto* dx = at<T>(p.dx, s);
        bool const streams = p.streams && aligned(dx);
        Affine const affine(p.lines, s.b);
        Ordered const slope = line(p.lines, s.b, kSlope), level = line(p.lines, s.b, kLevel);
        for_each_pair_of_periods(s.count, p.sizes.period, [&](int64_t i, int64_t e, auto elements) {
            Pair const c = load(T{}, x + i, elements) - affine.centre.load(e, elements);
            Pair const dz = through_silu<T, kSilu>(load(T{}, dy + i, elements), c, affine, e, elements);
            Pair const rest = c * slope.load(e, elements) + level.load(e, elements);
            write(T{}, dx + i, dz * affine.scale.load(e, elements) + rest, elements, streams);
        });
    }
    if (p.streams) finish_streams();
}

template <class T>
void order(float* line, int64_t count) {
    for (int64_t e = 0; e < count; e += kPair) {
        store(Float32{}, line + e, split(T{}, load(Float32{}, line + e, Whole{}), Whole{}), Whole{});
    }
}

template <class T, bool kSilu>
constexpr CpuKernels kKernels = {&statistics<T>, &forward<T, kSilu>, &gradient_sums<T, kSilu>,
                                 &backward<T, kSilu>, &order<T>};

inline CpuKernels const& kernels_of(DType dtype, bool silu) {
    switch (dtype) {
        case DType::f16: return silu ? kKernels<Float16, true> : kKernels<Float16, false>;
        case DType::bf16: return silu ? kKernels<BFloat16, true> : kKernels<BFloat16, false>;
        default: return silu ? kKernels<Float32, true> : kKernels<Float32, false>;
    }
}

}  // namespace hunyuan_fast::group_norm_silu::HUNYUAN_FAST_ISA
