// The row kernels for a CPU, compiled once per instruction set by cpu_<isa>.cpp.
//
// Memory is the floor: a row is read from it once, further passes find it in the first-level cache. The
// variance takes a pass of its own, over centred values: a large offset of x cannot spoil it. The residual
// is normalised as it was rounded, so that backward, which has nothing else, sees the same row.
#pragma once

#include <cmath>

#include "common/simd.h"
#include "fused_modulation/cpu.h"

namespace hunyuan_fast::fused_modulation::HUNYUAN_FAST_ISA {

using namespace hunyuan_fast::HUNYUAN_FAST_ISA;

// Independent sums, so that consecutive additions do not wait for each other.
constexpr int kSums = 4;
constexpr int64_t kBlock = kSums * kLanes;

// sum_lanes, in its order, without the way through memory: a short row has little else to do.
#if defined(__AVX2__)
inline double total(__m256d four) {
    __m128d const two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return two[0] + two[1];
}
#if defined(__AVX512F__)
inline double total(Vec v) {
    // the zero-masked forms, for the reason given in simd.h
    __m256 const low = _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 0);
    __m256 const high = _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1);
    __m512d const eight = _mm512_maskz_cvtps_pd(0xff, low) + _mm512_maskz_cvtps_pd(0xff, high);
    return total(_mm512_maskz_extractf64x4_pd(0xf, eight, 0) + _mm512_maskz_extractf64x4_pd(0xf, eight, 1));
}
#else
inline double total(Vec v) {
    __m128 const low = _mm256_castps256_ps128((__m256)v);
    __m128 const high = _mm256_extractf128_ps((__m256)v, 1);
    return total(_mm256_cvtps_pd(low) + _mm256_cvtps_pd(high));
}
#endif
#else
inline double total(Vec v) { return sum_lanes(v); }
#endif

struct Sum {
    Vec part[kSums] = {};
    double mean(int64_t count) const { return total((part[0] + part[1]) + (part[2] + part[3])) / double(count); }
};

template <class T>
inline typename T::Storage* row_of(Rows const& rows, int64_t b, int64_t l) {
    return static_cast<typename T::Storage*>(rows.data) + b * rows.stride_b + l * rows.stride_l;
}

inline float const* vector_of(Vectors const& vectors, int64_t b, int64_t m) {
    return static_cast<float const*>(vectors.data) + b * vectors.stride_b + m * vectors.stride_m;
}

// Calls body(offset, which sum) for every whole vector of a row, then tail(offset, count) for the rest.
template <class Body, class Tail>
inline void for_each_vector(int64_t E, Body body, Tail tail) {
    int64_t e = 0;
    for (; e + kBlock <= E; e += kBlock) {
        for (int k = 0; k < kSums; ++k) body(e + k * kLanes, k);
    }
    for (; e + kLanes <= E; e += kLanes) body(e, 0);
    if (e < E) tail(e, E - e);
}

template <class T>
Sum sum_of_row(typename T::Storage const* x, int64_t E) {
    T const type;
    Sum sum;
    for_each_vector(
        E,
        [&](int64_t e, int k) { sum.part[k] += load(type, x + e); },
        [&](int64_t e, int64_t n) { sum.part[0] += load_tail(type, x + e, n); });
    return sum;
}

// Writes x + gate * y and returns the sum of what was written, in the order of sum_of_row.
template <class X, class Y>
Sum gate_row(ForwardParams const& p, int64_t b, int64_t l, int64_t m) {
    X const x_type;
    Y const y_type;
    Float32 const f32;
    auto const* x = row_of<X>(p.x, b, l);
    auto const* y = row_of<Y>(p.y, b, l);
    float const* gate = vector_of(p.gate, b, m);
    auto* residual = row_of<X>(p.residual, b, l);
    Sum sum;
    for_each_vector(
        p.sizes.E,
        [&](int64_t e, int k) {
            store(x_type, residual + e, load(x_type, x + e) + load(f32, gate + e) * load(y_type, y + e));
            sum.part[k] += load(x_type, residual + e);
        },
        [&](int64_t e, int64_t n) {
            Vec const gated = load_tail(f32, gate + e, n) * load_tail(y_type, y + e, n);
            store_tail(x_type, residual + e, load_tail(x_type, x + e, n) + gated, n);
            sum.part[0] += load_tail(x_type, residual + e, n);
        });
    return sum;
}

template <class T>
void normalise_row(ForwardParams const& p, int64_t b, int64_t l, int64_t m, typename T::Storage const* x,
                   Sum const& sum) {
    T const type;
    Float32 const f32;
    int64_t const E = p.sizes.E;
    auto* y = row_of<T>(p.modulated, b, l);
    float const* shift = vector_of(p.shift, b, m);
    float const* scale = vector_of(p.scale, b, m);
    float const mean = float(sum.mean(E));

    Sum centred;
    Sum squares;
    auto const accumulate = [&](Vec c, int k) {
        centred.part[k] += c;
        squares.part[k] += c * c;
    };
    for_each_vector(
        E,
        [&](int64_t e, int k) { accumulate(load(type, x + e) - mean, k); },
        [&](int64_t e, int64_t n) { accumulate(keep_lanes(load_tail(type, x + e, n) - mean, n), 0); });
    // What rounding the mean to a float left over: it counts where |mean| is far above the deviation.
    double const rest = centred.mean(E);
    double const variance = squares.mean(E) - rest * rest;
    // a variance of NaN must stay one
    float const rstd = float(1.0 / std::sqrt((variance < 0 ? 0 : variance) + p.eps));
    float const offset = float(-rest) * rstd;

    auto const modulated = [&](Vec value, Vec gain, Vec add) {
        return ((value - mean) * rstd + offset) * (1.0f + gain) + add;
    };
    for_each_vector(
        E,
        [&](int64_t e, int) {
            store(type, y + e, modulated(load(type, x + e), load(f32, scale + e), load(f32, shift + e)));
        },
        [&](int64_t e, int64_t n) {
            Vec const add = load_tail(f32, shift + e, n);
            Vec const gain = load_tail(f32, scale + e, n);
            store_tail(type, y + e, modulated(load_tail(type, x + e, n), gain, add), n);
        });
    p.mean[b * p.sizes.L + l] = float(double(mean) + rest);
    p.rstd[b * p.sizes.L + l] = rstd;
}

template <class X, class Y, bool kGate, bool kNorm>
void forward_rows(ForwardParams const& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        int64_t const b = row / p.sizes.L;
        int64_t const l = row % p.sizes.L;
        int64_t const m = p.index(b, l);
        if constexpr (!kGate) {
            auto const* x = row_of<X>(p.x, b, l);
            normalise_row<X>(p, b, l, m, x, sum_of_row<X>(x, p.sizes.E));
        } else {
            Sum const sum = gate_row<X, Y>(p, b, l, m);
            if constexpr (kNorm) normalise_row<X>(p, b, l, m, row_of<X>(p.residual, b, l), sum);
        }
    }
}

// The gradients of the vectors that a row adds to: a part of `partials`, in this order.
struct VectorSums {
    float* dshift;
    float* dscale;
    float* dgate;
};

// From the gradient of the residual to those of y and gate.
template <class Y>
struct GateRow {
    typename Y::Storage const* y;  // null: dgate is not wanted
    typename Y::Storage* dy;       // null: dy is not wanted
    float const* gate;
    float* dgate;

    GateRow(BackwardParams const& p, int64_t b, int64_t l, int64_t m, VectorSums const& sums)
        : y(p.y.data ? row_of<Y>(p.y, b, l) : nullptr),
          dy(p.dy.data ? row_of<Y>(p.dy, b, l) : nullptr),
          gate(vector_of(p.gate, b, m)),
          dgate(sums.dgate) {}

    void whole(int64_t e, Vec d) const {
        Float32 const f32;
        if (dy) store(Y{}, dy + e, load(f32, gate + e) * d);
        if (y) store(f32, dgate + e, load(f32, dgate + e) + d * load(Y{}, y + e));
    }
    void tail(int64_t e, int64_t n, Vec d) const {
        Float32 const f32;
        if (dy) store_tail(Y{}, dy + e, load_tail(f32, gate + e, n) * d, n);
        if (y) store_tail(f32, dgate + e, load_tail(f32, dgate + e, n) + d * load_tail(Y{}, y + e, n), n);
    }
};

template <class X, class Y>
void backward_gate_row(BackwardParams const& p, int64_t b, int64_t l, int64_t m, VectorSums const& sums) {
    X const type;
    auto const* d = row_of<X>(p.dresidual, b, l);
    GateRow<Y> const gate(p, b, l, m, sums);
    for_each_vector(
        p.sizes.E,
        [&](int64_t e, int) { gate.whole(e, load(type, d + e)); },
        [&](int64_t e, int64_t n) { gate.tail(e, n, load_tail(type, d + e, n)); });
}

// Writes a row of dx, and of dy where there is a gate, and adds what the row gives to the sums.
template <class X, class Y, bool kGate>
void backward_norm_row(BackwardParams const& p, int64_t b, int64_t l, int64_t m, VectorSums const& sums) {
    X const type;
    Float32 const f32;
    int64_t const E = p.sizes.E;
    auto const* x = row_of<X>(p.residual, b, l);
    auto const* dy = row_of<X>(p.dmodulated, b, l);
    auto* dx = row_of<X>(p.dx, b, l);
    float* dshift = sums.dshift;
    float* dscale = sums.dscale;
    float const* scale = vector_of(p.scale, b, m);
    float const mean = p.mean[b * p.sizes.L + l];
    float const rstd = p.rstd[b * p.sizes.L + l];

    Sum sum_g;
    Sum sum_gn;
    auto const accumulate = [&](Vec d, Vec normed, Vec gain, int k) {
        Vec const g = d * (1.0f + gain);
        sum_g.part[k] += g;
        sum_gn.part[k] += g * normed;
    };
    for_each_vector(
        E,
        [&](int64_t e, int k) {
            Vec const d = load(type, dy + e);
            Vec const normed = (load(type, x + e) - mean) * rstd;
            store(f32, dshift + e, load(f32, dshift + e) + d);
            store(f32, dscale + e, load(f32, dscale + e) + d * normed);
            accumulate(d, normed, load(f32, scale + e), k);
        },
        [&](int64_t e, int64_t n) {
            Vec const d = load_tail(type, dy + e, n);
            Vec const normed = keep_lanes((load_tail(type, x + e, n) - mean) * rstd, n);
            store_tail(f32, dshift + e, load_tail(f32, dshift + e, n) + d, n);
            store_tail(f32, dscale + e, load_tail(f32, dscale + e, n) + d * normed, n);
            accumulate(d, normed, load_tail(f32, scale + e, n), 0);
        });
    float const mean_g = float(sum_g.mean(E));
    float const mean_gn = float(sum_gn.mean(E));

    auto const gradient = [&](Vec d, Vec value, Vec gain) {
        Vec const normed = (value - mean) * rstd;
        return (d * (1.0f + gain) - mean_g - normed * mean_gn) * rstd;
    };
    if constexpr (!kGate) {
        for_each_vector(
            E,
            [&](int64_t e, int) {
                store(type, dx + e, gradient(load(type, dy + e), load(type, x + e), load(f32, scale + e)));
            },
            [&](int64_t e, int64_t n) {
                Vec const gain = load_tail(f32, scale + e, n);
                store_tail(type, dx + e, gradient(load_tail(type, dy + e, n), load_tail(type, x + e, n), gain), n);
            });
    } else {
        auto const* direct = p.dresidual.data ? row_of<X>(p.dresidual, b, l) : nullptr;
        GateRow<Y> const gate(p, b, l, m, sums);
        for_each_vector(
            E,
            [&](int64_t e, int) {
                Vec d = gradient(load(type, dy + e), load(type, x + e), load(f32, scale + e));
                if (direct) d += load(type, direct + e);
                store(type, dx + e, d);
                gate.whole(e, d);
            },
            [&](int64_t e, int64_t n) {
                Vec d = gradient(load_tail(type, dy + e, n), load_tail(type, x + e, n), load_tail(f32, scale + e, n));
                if (direct) d += load_tail(type, direct + e, n);
                store_tail(type, dx + e, d, n);
                gate.tail(e, n, d);
            });
    }
}

// Chunks are numbered over all samples; each adds up its rows in order in its own part of `partials`.
template <class X, class Y, bool kGate, bool kNorm>
void backward_chunks(BackwardParams const& p, int64_t begin, int64_t end) {
    int64_t const columns = p.sizes.M * p.sizes.E;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        int64_t const b = chunk / p.chunks;
        int64_t const first = (chunk % p.chunks) * p.chunk_rows;
        int64_t const last = first + p.chunk_rows < p.sizes.L ? first + p.chunk_rows : p.sizes.L;
        float* part = p.partials + chunk * p.sums * columns;
        std::memset(part, 0, size_t(p.sums * columns) * sizeof(float));
        for (int64_t l = first; l < last; ++l) {
            int64_t const m = p.index(b, l);
            float* const own = part + m * p.sizes.E;
            if constexpr (kNorm) {
                backward_norm_row<X, Y, kGate>(p, b, l, m, {own, own + columns, own + 2 * columns});
            } else {
                backward_gate_row<X, Y>(p, b, l, m, {nullptr, nullptr, own});
            }
        }
    }
}

// Adds up the chunks of columns [begin, end) of every sum in order.
template <class V>
void reduce_columns(BackwardParams const& p, int64_t begin, int64_t end) {
    int64_t const columns = p.sizes.M * p.sizes.E;
    void* const norm_first[] = {p.dshift, p.dscale, p.dgate};
    void* const* const outputs = p.dshift ? norm_first : norm_first + 2;
    for (int64_t b = 0; b < p.sizes.B; ++b) {
        for (int64_t s = 0; s < p.sums; ++s) {
            float total[kColumnsPerPiece] = {};
            for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
                float const* part = p.partials + ((b * p.chunks + chunk) * p.sums + s) * columns + begin;
                for (int64_t i = 0; i < end - begin; ++i) total[i] += part[i];
            }
            auto* out = static_cast<typename V::Storage*>(outputs[s]) + b * columns + begin;
            for_each_vector(
                end - begin,
                [&](int64_t i, int) { store(V{}, out + i, load(Float32{}, total + i)); },
                [&](int64_t i, int64_t n) { store_tail(V{}, out + i, load_tail(Float32{}, total + i, n), n); });
        }
    }
}

template <class V>
void widen(void const* vector, float* out, int64_t count) {
    auto const* from = static_cast<typename V::Storage const*>(vector);
    for_each_vector(
        count,
        [&](int64_t e, int) { store(Float32{}, out + e, load(V{}, from + e)); },
        [&](int64_t e, int64_t n) { store_tail(Float32{}, out + e, load_tail(V{}, from + e, n), n); });
}

template <class X, class Y>
void choose_rows(Kind const& kind, CpuKernels& chosen) {
    if (!kind.norm) {
        chosen.forward_rows = &forward_rows<X, Y, true, false>;
        chosen.backward_chunks = &backward_chunks<X, Y, true, false>;
    } else if (kind.gate) {
        chosen.forward_rows = &forward_rows<X, Y, true, true>;
        chosen.backward_chunks = &backward_chunks<X, Y, true, true>;
    } else {
        chosen.forward_rows = &forward_rows<X, X, false, true>;
        chosen.backward_chunks = &backward_chunks<X, X, false, true>;
    }
}

// Calls use(T{}) with the element type that dtype stands for.
template <class Use>
inline void with_type(DType dtype, Use use) {
    switch (dtype) {
        case DType::f16: return use(Float16{});
        case DType::bf16: return use(BFloat16{});
        default: return use(Float32{});
    }
}

inline CpuKernels kernels_of(Kind const& kind) {
    CpuKernels chosen{};
    if (kind.x == DType::f32) {
        with_type(kind.y, [&](auto y) { choose_rows<Float32, decltype(y)>(kind, chosen); });
    } else {
        with_type(kind.x, [&](auto x) { choose_rows<decltype(x), decltype(x)>(kind, chosen); });
    }
    with_type(kind.vector, [&](auto v) {
        chosen.reduce_columns = &reduce_columns<decltype(v)>;
        chosen.widen = &widen<decltype(v)>;
    });
    return chosen;
}

}  // namespace hunyuan_fast::fused_modulation::HUNYUAN_FAST_ISA
