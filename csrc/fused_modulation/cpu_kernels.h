// The row kernels for a CPU, compiled once per instruction set by cpu_<isa>.cpp.
//
// Memory is the floor: a row is read from it once, further passes find it in the first-level cache. The
// variance takes a pass of its own, over centred values: a large offset of x cannot spoil it. The residual
// is normalised as it was rounded, so that backward, which has nothing else, sees the same row.
//
// X is the type of the rows, and its order (common/simd_pair.h) that of the vectors and of the sums for their
// gradients. Y is the type of y, in the order of X.
#pragma once

#include <cmath>

#include "common/simd_pair.h"
#include "fused_modulation/cpu.h"

namespace hunyuan_fast::fused_modulation::HUNYUAN_FAST_ISA {

using namespace hunyuan_fast::HUNYUAN_FAST_ISA;

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

// Independent sums, so that consecutive additions do not wait for each other.
struct Sum {
    Pair part[2];
    double mean(int64_t count) const {
        Pair const both = part[0] + part[1];
        return total(both.a + both.b) / double(count);
    }
};

// A row, and which of the vectors of its sample it meets.
struct Token {
    int64_t b, l, m;
};

inline Token token(Sizes const& sizes, Index const& index, int64_t row) {
    int64_t const b = row / sizes.L, l = row % sizes.L;
    return {b, l, index(b, l)};
}

template <class T>
inline typename T::Storage* row_of(Rows const& rows, Token const& t) {
    return static_cast<typename T::Storage*>(rows.data) + t.b * rows.stride_b + t.l * rows.stride_l;
}

inline float const* vector_of(Vectors const& vectors, Token const& t) {
    return static_cast<float const*>(vectors.data) + t.b * vectors.stride_b + t.m * vectors.stride_m;
}

template <class X>
Sum sum_of_row(typename X::Storage const* x, int64_t E) {
    Sum sum;
    for_each_pair(E, [&](int64_t e, int k, auto elements) { sum.part[k] = sum.part[k] + load(X{}, x + e, elements); });
    return sum;
}

// What a row is normalised from, where the residual itself is not written yet.
template <class X>
struct alignas(64) Scratch {
    typename X::Storage row[kMaxStreamed];
};

// Writes x + gate * y and returns the sum of what was written, in the order of sum_of_row.
template <class X, class Y, bool kSum>
Sum gate_row(ForwardParams const& p, Token const& t, typename X::Storage* residual, bool streams) {
    auto const* x = row_of<X>(p.x, t);
    auto const* y = row_of<Y>(p.y, t);
    float const* gate = vector_of(p.gate, t);
    Sum sum;
    for_each_pair(p.sizes.E, [&](int64_t e, int k, auto elements) {
        Pair const gated = load(Float32{}, gate + e, elements) * load(Y{}, y + e, elements);
        Pair const value = load(X{}, x + e, elements) + gated;
        if constexpr (kSum) {
            sum.part[k] = sum.part[k] + store(X{}, residual + e, value, elements);
        } else {
            write(X{}, residual + e, value, elements, streams);
        }
    });
    return sum;
}

// Normalises and modulates the row x. `residual`, if not null, takes a copy of it. What the next row will read
// is fetched meanwhile: a pass that computes from the cache leaves memory idle.
template <class X, class Y>
void normalise_row(ForwardParams const& p, Token const& t, Token const& next, typename X::Storage const* x,
                   Sum const& sum, typename X::Storage* residual) {
    int64_t const E = p.sizes.E;
    auto* out = row_of<X>(p.modulated, t);
    auto const* next_x = row_of<X>(p.x, next);
    auto const* next_y = p.y.data ? row_of<Y>(p.y, next) : nullptr;
    float const* shift = vector_of(p.shift, t);
    float const* scale = vector_of(p.scale, t);
    float const mean = float(sum.mean(E));

    Sum centred;
    Sum squares;
    for_each_pair(E, [&](int64_t e, int k, auto elements) {
        Pair const c = keep(load(X{}, x + e, elements) - mean, elements);
        centred.part[k] = centred.part[k] + c;
        squares.part[k] = squares.part[k] + c * c;
        fetch(next_x + e);
    });
    // What rounding the mean to a float left over: it counts where |mean| is far above the deviation.
    double const rest = centred.mean(E);
    double const variance = squares.mean(E) - rest * rest;
    // a variance of NaN must stay one
    float const rstd = float(1.0 / std::sqrt((variance < 0 ? 0 : variance) + p.eps));
    float const offset = float(-rest) * rstd;

    for_each_pair(E, [&](int64_t e, int, auto elements) {
        Pair const value = load(X{}, x + e, elements);
        Pair const normed = (value - mean) * rstd + offset;
        Pair const gain = load(Float32{}, scale + e, elements) + 1.0f;
        write(X{}, out + e, normed * gain + load(Float32{}, shift + e, elements), elements, p.streams);
        if (residual) stream(X{}, residual + e, value, elements);
        if (next_y) fetch(next_y + e);
    });
    p.mean[t.b * p.sizes.L + t.l] = float(double(mean) + rest);
    p.rstd[t.b * p.sizes.L + t.l] = rstd;
}

template <class X, class Y, bool kGate, bool kNorm>
void forward_rows(ForwardParams const& p, int64_t begin, int64_t end) {
    Scratch<X> scratch;
    for (int64_t row = begin; row < end; ++row) {
        Token const t = token(p.sizes, p.index, row);
        Token const next = row + 1 < end ? token(p.sizes, p.index, row + 1) : t;
        if constexpr (!kGate) {
            auto const* x = row_of<X>(p.x, t);
            normalise_row<X, Y>(p, t, next, x, sum_of_row<X>(x, p.sizes.E), nullptr);
        } else if constexpr (!kNorm) {
            gate_row<X, Y, false>(p, t, row_of<X>(p.residual, t), p.streams);
        } else {
            auto* const residual = row_of<X>(p.residual, t);
            auto* const x = p.streams ? scratch.row : residual;
            Sum const sum = gate_row<X, Y, true>(p, t, x, false);
            normalise_row<X, Y>(p, t, next, x, sum, p.streams ? residual : nullptr);
        }
    }
    if (p.streams) finish_streams();
}

// The gradients of the vectors that a row adds to: a part of `partials`, in this order.
struct VectorSums {
    float* dshift;
    float* dscale;
    float* dgate;
};

template <class Elements>
inline void add_to(float* sums, Pair v, Elements elements) {
    store(Float32{}, sums, load(Float32{}, sums, elements) + v, elements);
}

// From the gradient of the residual to those of y and gate.
template <class Y>
struct GateRow {
    typename Y::Storage const* y;  // null: dgate is not wanted
    typename Y::Storage* dy;       // null: dy is not wanted
    float const* gate;
    float* dgate;
    bool streams;

    GateRow(BackwardParams const& p, Token const& t, VectorSums const& sums)
        : y(p.y.data ? row_of<Y>(p.y, t) : nullptr),
          dy(p.dy.data ? row_of<Y>(p.dy, t) : nullptr),
          gate(vector_of(p.gate, t)),
          dgate(sums.dgate),
          streams(p.streams) {}

    void fetch_y(int64_t e) const {
        if (y) fetch(y + e);
    }

    template <class Elements>
    void operator()(int64_t e, Pair d, Elements elements) const {
        if (dy) write(Y{}, dy + e, load(Float32{}, gate + e, elements) * d, elements, streams);
        if (y) add_to(dgate + e, d * load(Y{}, y + e, elements), elements);
    }
};

template <class X, class Y>
void backward_gate_row(BackwardParams const& p, Token const& t, VectorSums const& sums) {
    auto const* d = row_of<X>(p.dresidual, t);
    GateRow<Y> const gate(p, t, sums);
    for_each_pair(p.sizes.E, [&](int64_t e, int, auto elements) { gate(e, load(X{}, d + e, elements), elements); });
}

// Writes a row of dx, and of dy where there is a gate, and adds what the row gives to the sums. Each pass fetches
// what the other reads first: the second that of the next row.
template <class X, class Y, bool kGate>
void backward_norm_row(BackwardParams const& p, Token const& t, Token const& next, VectorSums const& sums) {
    int64_t const E = p.sizes.E;
    auto const* x = row_of<X>(p.residual, t);
    auto const* dy = row_of<X>(p.dmodulated, t);
    auto const* next_x = row_of<X>(p.residual, next);
    auto const* next_dy = row_of<X>(p.dmodulated, next);
    auto const* direct = kGate && p.dresidual.data ? row_of<X>(p.dresidual, t) : nullptr;
    auto* dx = row_of<X>(p.dx, t);
    float const* scale = vector_of(p.scale, t);
    float const mean = p.mean[t.b * p.sizes.L + t.l];
    float const rstd = p.rstd[t.b * p.sizes.L + t.l];
    GateRow<Y> const gate(p, t, sums);

    Sum sum_g;
    Sum sum_gn;
    for_each_pair(E, [&](int64_t e, int k, auto elements) {
        Pair const d = load(X{}, dy + e, elements);
        Pair const normed = keep((load(X{}, x + e, elements) - mean) * rstd, elements);
        Pair const g = d * (load(Float32{}, scale + e, elements) + 1.0f);
        add_to(sums.dshift + e, d, elements);
        add_to(sums.dscale + e, d * normed, elements);
        sum_g.part[k] = sum_g.part[k] + g;
        sum_gn.part[k] = sum_gn.part[k] + g * normed;
        if (direct) fetch(direct + e);
        if constexpr (kGate) gate.fetch_y(e);
    });
    float const mean_g = float(sum_g.mean(E));
    float const mean_gn = float(sum_gn.mean(E));

    for_each_pair(E, [&](int64_t e, int, auto elements) {
        Pair const normed = (load(X{}, x + e, elements) - mean) * rstd;
        Pair const g = load(X{}, dy + e, elements) * (load(Float32{}, scale + e, elements) + 1.0f);
        Pair d = (g - mean_g - normed * mean_gn) * rstd;
        if (direct) d = d + load(X{}, direct + e, elements);
        write(X{}, dx + e, d, elements, p.streams);
        if constexpr (kGate) gate(e, d, elements);
        fetch(next_x + e);
        fetch(next_dy + e);
    });
}

// Chunks are numbered over all samples; each adds up its rows in order in its own part of `partials`.
template <class X, class Y, bool kGate, bool kNorm>
void backward_chunks(BackwardParams const& p, int64_t begin, int64_t end) {
    auto const& [B, L, E, M] = p.sizes;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        int64_t const first = chunk / p.chunks * L + chunk % p.chunks * p.chunk_rows;
        int64_t const end_of_sample = (chunk / p.chunks + 1) * L;
        int64_t const last = first + p.chunk_rows < end_of_sample ? first + p.chunk_rows : end_of_sample;
        float* part = p.partials + chunk * p.sums * M * E;
        std::memset(part, 0, size_t(p.sums * M * E) * sizeof(float));
        for (int64_t row = first; row < last; ++row) {
            Token const t = token(p.sizes, p.index, row);
            float* const own = part + t.m * E;
            if constexpr (kNorm) {
                Token const next = row + 1 < last ? token(p.sizes, p.index, row + 1) : t;
                backward_norm_row<X, Y, kGate>(p, t, next, {own, own + M * E, own + 2 * M * E});
            } else {
                backward_gate_row<X, Y>(p, t, {nullptr, nullptr, own});
            }
        }
    }
    if (p.streams) finish_streams();
}

// Adds up the chunks of some columns of every vector's sums, in order. Blocks of kColumnsPerPiece columns are
// numbered over the M vectors of a sample, so that a block starts where a pair does.
template <class X, class V>
void reduce_blocks(BackwardParams const& p, int64_t begin, int64_t end) {
    auto const& [B, L, E, M] = p.sizes;
    int64_t const per_vector = blocks_of(E);
    void* const norm_first[] = {p.dshift, p.dscale, p.dgate};
    void* const* const outputs = p.dshift ? norm_first : norm_first + 2;
    for (int64_t block = begin; block < end; ++block) {
        int64_t const e = block % per_vector * kColumnsPerPiece;
        int64_t const column = block / per_vector * E + e;
        int64_t const count = kColumnsPerPiece < E - e ? kColumnsPerPiece : E - e;
        for (int64_t b = 0; b < B; ++b) {
            for (int64_t s = 0; s < p.sums; ++s) {
                float sum[kColumnsPerPiece] = {};
                for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
                    float const* part = p.partials + ((b * p.chunks + chunk) * p.sums + s) * M * E + column;
                    for (int64_t i = 0; i < count; ++i) sum[i] += part[i];
                }
                for_each_pair(count, [&](int64_t i, int, auto elements) {
                    store(Float32{}, sum + i, unsplit(X{}, load(Float32{}, sum + i, elements), elements), elements);
                });
                auto* out = static_cast<typename V::Storage*>(outputs[s]) + b * M * E + column;
                convert(Float32{}, sum, V{}, out, count);
            }
        }
    }
}

// A vector as the rows of type X meet it. Where 16 bits are rounded by the pair, a NaN must have nothing in its
// lower half.
template <class X, class V>
void prepare(void const* vector, float* out, int64_t E) {
    convert(V{}, static_cast<typename V::Storage const*>(vector), Float32{}, out, E);
    for (int64_t e = 0; e < E; ++e) out[e] = out[e] == out[e] ? out[e] : float(NAN);
    for_each_pair(E, [&](int64_t e, int, auto elements) {
        store(Float32{}, out + e, split(X{}, load(Float32{}, out + e, elements), elements), elements);
    });
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

template <class X, class V>
void choose_vectors(CpuKernels& chosen) {
    chosen.reduce_blocks = &reduce_blocks<X, V>;
    chosen.prepare = &prepare<X, V>;
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
    switch (kind.x) {
        case DType::bf16: choose_rows<BFloat16, BFloat16>(kind, chosen); break;
        case DType::f16: choose_rows<Float16, Float16>(kind, chosen); break;
        default:
            switch (kind.y) {
                case DType::bf16: choose_rows<Float32, BFloat16InOrder>(kind, chosen); break;
                case DType::f16: choose_rows<Float32, Float16>(kind, chosen); break;
                default: choose_rows<Float32, Float32>(kind, chosen);
            }
    }
    with_type(kind.vector, [&](auto v) {
        if (kind.x == DType::bf16) return choose_vectors<BFloat16, decltype(v)>(chosen);
        choose_vectors<Float32, decltype(v)>(chosen);
    });
    return chosen;
}

}  // namespace hunyuan_fast::fused_modulation::HUNYUAN_FAST_ISA
