// The row kernels for a CPU, compiled once per instruction set by cpu_<isa>.cpp.
//
// Memory is the floor: a row of qkv is read from it once; a head's second pass finds it in the first-level
// cache. A rotation is two products, for what multiplies a feature itself and what multiplies its neighbour are
// laid out per row, once for all heads, in the order of T (common/simd_pair.h).
#pragma once

#include <cmath>

#include "common/simd_pair.h"
#include "qk_norm_rope/cpu.h"

namespace hunyuan_fast::qk_norm_rope::HUNYUAN_FAST_ISA {

using namespace hunyuan_fast::HUNYUAN_FAST_ISA;

// How many features ahead a head is fetched.
constexpr int64_t kAhead = 1024;

// One value per feature of a head; a pair that starts inside is whole.
struct alignas(64) Features {
    float at[kMaxD + kPair];
};

// Every pair of lanes (a, b) as (b, a), and as (a, a).
#if defined(__AVX512F__)
inline Vec swap_pairs(Vec v) { return (Vec)_mm512_maskz_permute_ps(kAll, (__m512)v, 0xb1); }
inline Vec repeat_even(Vec v) { return (Vec)_mm512_maskz_permute_ps(kAll, (__m512)v, 0xa0); }
#elif defined(__AVX2__)
inline Vec swap_pairs(Vec v) { return (Vec)_mm256_permute_ps((__m256)v, 0xb1); }
inline Vec repeat_even(Vec v) { return (Vec)_mm256_permute_ps((__m256)v, 0xa0); }
#else
inline Vec swap_pairs(Vec v) { return Vec{v[1], v[0], v[3], v[2]}; }
inline Vec repeat_even(Vec v) { return Vec{v[0], v[0], v[2], v[2]}; }
#endif

// (-v, v, -v, v, ...)
inline Vec negate_even(Vec v) {
    VecBits sign{};
    for (int i = 0; i < kLanes; i += 2) sign[i] = 0x80000000u;
    return (Vec)((VecBits)v ^ sign);
}

// The neighbour of every feature in its rotated pair.
template <class T, class Elements>
inline Pair neighbours(T, Pair v, Elements) {
    return {swap_pairs(v.a), swap_pairs(v.b)};
}
inline Pair neighbours(BFloat16, Pair v, Whole) { return {v.b, v.a}; }

inline float add_lanes(Vec v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    __m256 const wide = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 0),
                                      _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1));
#else
    __m256 const wide = (__m256)v;
#endif
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(wide), _mm256_extractf128_ps(wide, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

struct Sum {
    Pair part[2];
    float total() const {
        Pair const both = part[0] + part[1];
        return add_lanes(both.a + both.b);
    }
    void add(int k, Pair v) { part[k] = part[k] + v; }
};

inline Pair at(Features const& features, int64_t d) { return load(Float32{}, features.at + d, Whole{}); }
inline void set(Features& features, int64_t d, Pair v) { store(Float32{}, features.at + d, v, Whole{}); }

// A row of the joint sequence: where it comes from, and whether it is turned.
struct Row {
    int64_t b, l;
    int which;  // stream
    int64_t in_stream;
    bool rotated;
};

inline Row locate(Inputs const& p, int64_t index) {
    int64_t const b = index / p.sizes.L, l = index % p.sizes.L;
    int const which = p.streams > 1 && l >= p.stream[1].first ? 1 : 0;
    return {b, l, which, l - p.stream[which].first, l < p.sizes.L_video};
}

template <class T>
inline typename T::Storage* row_of(Packed const& packed, Row const& row) {
    auto* const data = static_cast<typename T::Storage*>(packed.data);
    return data + row.b * packed.stride_b + row.in_stream * packed.stride_l;
}

template <class T>
inline typename T::Storage* row_of(Heads const& heads, Row const& row) {
    auto* const data = static_cast<typename T::Storage*>(heads.data);
    return data + row.b * heads.stride_b + row.l * heads.stride_l;
}

// Null for a row that is not turned.
inline float const* row_of(Table const& table, Row const& row) {
    return row.rotated ? table.data + row.l * table.stride_l : nullptr;
}

// The N heads of a row side by side on the packed side, `stride` apart on the other.
template <class T>
inline void copy_heads(typename T::Storage* to, int64_t to_stride, typename T::Storage const* from,
                       int64_t from_stride, Sizes const& sizes, bool streams) {
    bool const dense = to_stride == sizes.D && from_stride == sizes.D;
    int64_t const times = dense ? 1 : sizes.N;
    size_t const bytes = size_t(dense ? sizes.N * sizes.D : sizes.D) * sizeof *to;
    for (int64_t n = 0; n < times; ++n) {
        if (streams) {
            stream_copy(to + n * to_stride, from + n * from_stride, bytes);
        } else {
            std::memcpy(to + n * to_stride, from + n * from_stride, bytes);
        }
    }
}

inline float reciprocal_rms(float squares, Inputs const& p) {
    return float(1.0 / std::sqrt(double(squares) / double(p.sizes.D) + p.eps));
}

// out = (x * same + its neighbour * other) / rms(x)
struct Gains {
    Features same;
    Features other;
};

// The tables of a row in consecutive order, signed for the way there: (-sin, sin, -sin, sin, ...).
template <class Elements>
inline Pair cos_of(float const* table, int64_t d, Elements elements) {
    Pair const cos = load(Float32{}, table + d, elements);
    return {repeat_even(cos.a), repeat_even(cos.b)};
}
template <class Elements>
inline Pair sin_of(float const* table, int64_t d, Elements elements) {
    Pair const sin = load(Float32{}, table + d, elements);
    return {negate_even(repeat_even(sin.a)), negate_even(repeat_even(sin.b))};
}

template <class T>
inline void lay_out(Gains& gains, Inputs const& p, Row const& row, float const* weight) {
    float const* cos = row_of(p.cos, row);
    float const* sin = row_of(p.sin, row);
    for_each_pair(p.sizes.D, [&](int64_t d, int, auto elements) {
        Pair const w = load(Float32{}, weight + d, elements);
        if (!row.rotated) return set(gains.same, d, split(T{}, w, elements));
        Pair const other = Pair{swap_pairs(w.a), swap_pairs(w.b)} * sin_of(sin, d, elements);
        set(gains.same, d, split(T{}, w * cos_of(cos, d, elements), elements));
        set(gains.other, d, split(T{}, other, elements));
    });
}

template <class T, bool kRotated>
void forward_heads(ForwardParams const& p, Gains const& gains, typename T::Storage const* x,
                   typename T::Storage* out, int64_t out_stride) {
    int64_t const D = p.sizes.D;
    for (int64_t n = 0; n < p.sizes.N; ++n, x += D, out += out_stride) {
        Sum squares;
        for_each_pair(D, [&](int64_t d, int k, auto elements) {
            Pair const v = load(T{}, x + d, elements);
            squares.add(k, v * v);
            fetch(x + d + kAhead);
        });
        float const rstd = reciprocal_rms(squares.total(), p);
        for_each_pair(D, [&](int64_t d, int, auto elements) {
            Pair const v = load(T{}, x + d, elements);
            Pair y = v * at(gains.same, d);
            if constexpr (kRotated) y = y + neighbours(T{}, v, elements) * at(gains.other, d);
            write(T{}, out + d, y * rstd, elements, p.streams);
        });
    }
}

template <class T>
void forward_rows(ForwardParams const& p, int64_t begin, int64_t end) {
    Sizes const& sizes = p.sizes;
    Gains gains;
    for (int64_t index = begin; index < end; ++index) {
        Row const row = locate(p, index);
        Stream const& stream = p.stream[row.which];
        auto const* packed = row_of<T>(stream.qkv, row);
        for (int i = 0; i < 2; ++i, packed += sizes.N * sizes.D) {
            if (p.out[i].data == nullptr) continue;
            lay_out<T>(gains, p, row, stream.weights[i]);
            auto const run = row.rotated ? forward_heads<T, true> : forward_heads<T, false>;
            run(p, gains, packed, row_of<T>(p.out[i], row), p.out[i].stride_n);
        }
        copy_heads<T>(row_of<T>(p.out[2], row), p.out[2].stride_n, packed, sizes.D, sizes, p.streams);
    }
    if (p.streams) finish_streams();
}

// With g the gradient of the output, u = g * cos + its neighbour * sin is that of n * weight, where n is x over
// its root mean square; sin has the signs of the way back.
struct Angles {
    Features cos;
    Features sin;
};

template <class T>
inline void lay_out(Angles& angles, Inputs const& p, Row const& row) {
    float const* cos = row_of(p.cos, row);
    float const* sin = row_of(p.sin, row);
    for_each_pair(p.sizes.D, [&](int64_t d, int, auto elements) {
        set(angles.cos, d, split(T{}, cos_of(cos, d, elements), elements));
        set(angles.sin, d, split(T{}, sin_of(sin, d, elements) * -1.0f, elements));
    });
}

// What the rows of a chunk share, in the order of T; weights and sums of q and k in each stream.
struct BackwardScratch {
    Angles angles;
    Features turned;
    Features weight[kMaxStreams][2];
    Features of_row;  // over its heads
    Features sums[kMaxStreams][2];
    Features excess[kMaxStreams][2];  // what rounding has added to the sums
};

// Adds a row's sums to those of its chunk, without losing digits to their size (Kahan).
inline void add_row(BackwardScratch& scratch, int64_t D, int stream, int i) {
    Features& sums = scratch.sums[stream][i];
    Features& excess = scratch.excess[stream][i];
    for (int64_t d = 0; d < D; d += kPair) {
        Pair const before = at(sums, d);
        Pair const addend = at(scratch.of_row, d) - at(excess, d);
        Pair const after = before + addend;
        set(sums, d, after);
        set(excess, d, (after - before) - addend);
        set(scratch.of_row, d, Pair{});
    }
}

template <class T>
void start_chunk(BackwardScratch& scratch, BackwardParams const& p) {
    for (int s = 0; s < p.streams; ++s) {
        for (int i = 0; i < 2; ++i) {
            for_each_pair(p.sizes.D, [&](int64_t d, int, auto elements) {
                Pair const w = load(Float32{}, p.stream[s].weights[i] + d, elements);
                set(scratch.weight[s][i], d, split(T{}, w, elements));
                set(scratch.sums[s][i], d, Pair{});
                set(scratch.excess[s][i], d, Pair{});
                set(scratch.of_row, d, Pair{});
            });
        }
    }
}

// (streams, 2, D)
template <class T>
void store_sums(BackwardScratch const& scratch, BackwardParams const& p, float* partials) {
    for (int s = 0; s < p.streams; ++s) {
        for (int i = 0; i < 2; ++i, partials += p.sizes.D) {
            for_each_pair(p.sizes.D, [&](int64_t d, int, auto elements) {
                Pair const sum = at(scratch.sums[s][i], d) - at(scratch.excess[s][i], d);
                store(Float32{}, partials + d, unsplit(T{}, sum, elements), elements);
            });
        }
    }
}

// Writes dx for the heads of a row, and adds what they give to the sums for the weight.
template <class T, bool kRotated>
void backward_heads(BackwardParams const& p, BackwardScratch& scratch, Features const& weight,
                    typename T::Storage const* g, int64_t g_stride, typename T::Storage const* x,
                    typename T::Storage* dx, bool streams) {
    int64_t const D = p.sizes.D;
    Angles const& angles = scratch.angles;
    for (int64_t n = 0; n < p.sizes.N; ++n, g += g_stride, x += D, dx += D) {
        Sum squares;
        Sum products;
        for_each_pair(D, [&](int64_t d, int k, auto elements) {
            Pair const v = load(T{}, x + d, elements);
            Pair u = load(T{}, g + d, elements);
            if constexpr (kRotated) u = u * at(angles.cos, d) + neighbours(T{}, u, elements) * at(angles.sin, d);
            set(scratch.turned, d, u);
            squares.add(k, v * v);
            products.add(k, u * at(weight, d) * v);
            fetch(x + d + kAhead);
            fetch(g + d + kAhead);
        });
        float const rstd = reciprocal_rms(squares.total(), p);
        // the part of the gradient along x, which normalising takes away, for each unit of n
        float const along = products.total() * rstd / float(D);
        for_each_pair(D, [&](int64_t d, int, auto elements) {
            Pair const normed = load(T{}, x + d, elements) * rstd;
            Pair const u = at(scratch.turned, d);
            set(scratch.of_row, d, at(scratch.of_row, d) + u * normed);
            write(T{}, dx + d, (u * at(weight, d) - normed * along) * rstd, elements, streams);
        });
    }
}

// One row: dqkv, and its share of the sums.
template <class T>
void backward_row(BackwardParams const& p, Row const& row, BackwardScratch& scratch) {
    Sizes const& sizes = p.sizes;
    Stream const& stream = p.stream[row.which];
    auto const* packed = row_of<T>(stream.qkv, row);
    auto* dpacked = row_of<T>(stream.dqkv, row);
    if (row.rotated) lay_out<T>(scratch.angles, p, row);
    auto const run = row.rotated ? backward_heads<T, true> : backward_heads<T, false>;
    for (int i = 0; i < 2; ++i) {
        run(p, scratch, scratch.weight[row.which][i], row_of<T>(p.gradient[i], row), p.gradient[i].stride_n, packed,
            dpacked, stream.streams);
        add_row(scratch, sizes.D, row.which, i);
        packed += sizes.N * sizes.D;
        dpacked += sizes.N * sizes.D;
    }
    copy_heads<T>(dpacked, sizes.D, row_of<T>(p.gradient[2], row), p.gradient[2].stride_n, sizes, stream.streams);
}

// Chunks are numbered over the rows of all samples; each adds up its rows in order in its part of `partials`.
template <class T>
void backward_chunks(BackwardParams const& p, int64_t begin, int64_t end) {
    int64_t const rows = p.sizes.B * p.sizes.L;
    BackwardScratch scratch;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        int64_t const first = chunk * p.chunk_rows;
        int64_t const last = first + p.chunk_rows < rows ? first + p.chunk_rows : rows;
        start_chunk<T>(scratch, p);
        for (int64_t index = first; index < last; ++index) backward_row<T>(p, locate(p, index), scratch);
        store_sums<T>(scratch, p, p.partials + chunk * p.streams * 2 * p.sizes.D);
    }
    if (p.stream[0].streams || p.stream[1].streams) finish_streams();
}

template <class T>
constexpr CpuKernels kKernels = {&forward_rows<T>, &backward_chunks<T>};

inline CpuKernels const& kernels_of(DType dtype) {
    switch (dtype) {
        case DType::f16: return kKernels<Float16>;
        case DType::bf16: return kKernels<BFloat16>;
        default: return kKernels<Float32>;
    }
}

}  // namespace hunyuan_fast::qk_norm_rope::HUNYUAN_FAST_ISA
