// The row kernels for a CPU, compiled once per instruction set by cpu_<isa>.cpp.
//
// Memory is the floor: a row of qkv is read from it once; a head's second pass finds it in the first-level
// cache. A rotation is two products and a swap of neighbours within a vector, for what multiplies a feature
// itself and what multiplies its neighbour are laid out per row, once for all heads.
#pragma once

#include <cmath>

#include "common/simd.h"
#include "qk_norm_rope/cpu.h"

namespace hunyuan_fast::qk_norm_rope::HUNYUAN_FAST_ISA {

using namespace hunyuan_fast::HUNYUAN_FAST_ISA;

// Independent sums, so that consecutive additions do not wait for each other.
constexpr int kSums = 4;
constexpr int64_t kBlock = kSums * kLanes;

// One value per feature of a head; a vector that starts inside is whole.
struct alignas(64) Features {
    float at[kMaxD + kLanes];
};

// The lanes of a vector that belong to the head: all of them, or the first few.
struct Whole {};
struct Part {
    int64_t count;
};

template <class T>
inline Vec load_lanes(T type, typename T::Storage const* p, Whole) {
    return load(type, p);
}
template <class T>
inline Vec load_lanes(T type, typename T::Storage const* p, Part part) {
    return load_tail(type, p, part.count);
}
template <class T>
inline void store_lanes(T type, typename T::Storage* p, Vec v, Whole) {
    store(type, p, v);
}
template <class T>
inline void store_lanes(T type, typename T::Storage* p, Vec v, Part part) {
    store_tail(type, p, v, part.count);
}

// Calls body(offset, which sum, lanes) for every vector of a head.
template <class Body>
inline void for_each_vector(int64_t D, Body body) {
    int64_t d = 0;
    for (; d + kBlock <= D; d += kBlock) {
        for (int k = 0; k < kSums; ++k) body(d + k * kLanes, k, Whole{});
    }
    for (; d + kLanes <= D; d += kLanes) body(d, 0, Whole{});
    if (d < D) body(d, 0, Part{D - d});
}

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
    Vec part[kSums] = {};
    float total() const { return add_lanes((part[0] + part[1]) + (part[2] + part[3])); }
};

inline Vec at(Features const& features, int64_t d) { return load_as<Vec>(features.at + d); }
inline void set(Features& features, int64_t d, Vec v) { store_as(features.at + d, v); }

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
                       int64_t from_stride, Sizes const& sizes) {
    bool const dense = to_stride == sizes.D && from_stride == sizes.D;
    int64_t const times = dense ? 1 : sizes.N;
    size_t const bytes = size_t(dense ? sizes.N * sizes.D : sizes.D) * sizeof *to;
    for (int64_t n = 0; n < times; ++n) std::memcpy(to + n * to_stride, from + n * from_stride, bytes);
}

inline float reciprocal_rms(float squares, Inputs const& p) {
    return float(1.0 / std::sqrt(double(squares) / double(p.sizes.D) + p.eps));
}

// out = (x * same + swap_pairs(x) * other) / rms(x)
struct Gains {
    Features same;
    Features other;
};

inline void lay_out(Gains& gains, Inputs const& p, Row const& row, float const* weight) {
    Float32 const f32;
    float const* cos = row_of(p.cos, row);
    float const* sin = row_of(p.sin, row);
    for_each_vector(p.sizes.D, [&](int64_t d, int, auto lanes) {
        Vec const w = load_lanes(f32, weight + d, lanes);
        if (!row.rotated) return set(gains.same, d, w);
        set(gains.same, d, w * repeat_even(load_lanes(f32, cos + d, lanes)));
        set(gains.other, d, swap_pairs(w) * negate_even(repeat_even(load_lanes(f32, sin + d, lanes))));
    });
}

template <class T, bool kRotated>
void forward_heads(ForwardParams const& p, Gains const& gains, typename T::Storage const* x,
                   typename T::Storage* out, int64_t out_stride) {
    T const type;
    int64_t const D = p.sizes.D;
    for (int64_t n = 0; n < p.sizes.N; ++n, x += D, out += out_stride) {
        Sum squares;
        for_each_vector(D, [&](int64_t d, int k, auto lanes) {
            Vec const v = load_lanes(type, x + d, lanes);
            squares.part[k] += v * v;
        });
        float const rstd = reciprocal_rms(squares.total(), p);
        for_each_vector(D, [&](int64_t d, int, auto lanes) {
            Vec const v = load_lanes(type, x + d, lanes);
            Vec y = v * at(gains.same, d);
            if constexpr (kRotated) y += swap_pairs(v) * at(gains.other, d);
            store_lanes(type, out + d, y * rstd, lanes);
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
            lay_out(gains, p, row, stream.weights[i]);
            auto const run = row.rotated ? forward_heads<T, true> : forward_heads<T, false>;
            run(p, gains, packed, row_of<T>(p.out[i], row), p.out[i].stride_n);
        }
        copy_heads<T>(row_of<T>(p.out[2], row), p.out[2].stride_n, packed, sizes.D, sizes);
    }
}

// With g the gradient of the output, u = g * cos + swap_pairs(g) * sin is that of n * weight, where n is x
// over its root mean square; sin has the signs of the way back.
struct Angles {
    Features cos;
    Features sin;
};

inline void lay_out(Angles& angles, Inputs const& p, Row const& row) {
    Float32 const f32;
    float const* cos = row_of(p.cos, row);
    float const* sin = row_of(p.sin, row);
    for_each_vector(p.sizes.D, [&](int64_t d, int, auto lanes) {
        set(angles.cos, d, repeat_even(load_lanes(f32, cos + d, lanes)));
        set(angles.sin, d, -negate_even(repeat_even(load_lanes(f32, sin + d, lanes))));
    });
}

// Writes dx for the heads of a row, and adds what they give to dweight.
template <class T, bool kRotated>
void backward_heads(BackwardParams const& p, Angles const& angles, Features const& weight,
                    typename T::Storage const* g, int64_t g_stride, typename T::Storage const* x,
                    typename T::Storage* dx, Features& dweight) {
    T const type;
    int64_t const D = p.sizes.D;
    Features turned;
    for (int64_t n = 0; n < p.sizes.N; ++n, g += g_stride, x += D, dx += D) {
        Sum squares;
        Sum products;
        for_each_vector(D, [&](int64_t d, int k, auto lanes) {
            Vec const v = load_lanes(type, x + d, lanes);
            Vec u = load_lanes(type, g + d, lanes);
            if constexpr (kRotated) u = u * at(angles.cos, d) + swap_pairs(u) * at(angles.sin, d);
            set(turned, d, u);
            squares.part[k] += v * v;
            products.part[k] += u * at(weight, d) * v;
        });
        float const rstd = reciprocal_rms(squares.total(), p);
        // the part of the gradient along x, which normalising takes away, for each unit of n
        float const along = products.total() * rstd / float(D);
        for_each_vector(D, [&](int64_t d, int, auto lanes) {
            Vec const normed = load_lanes(type, x + d, lanes) * rstd;
            Vec const u = at(turned, d);
            set(dweight, d, at(dweight, d) + u * normed);
            store_lanes(type, dx + d, (u * at(weight, d) - normed * along) * rstd, lanes);
        });
    }
}

struct BackwardScratch {
    Angles angles;
    Features weight;
    Features dweight;
};

// One row: dqkv, and its share of the sums (2, D) of its stream.
template <class T>
void backward_row(BackwardParams const& p, Row const& row, BackwardScratch& scratch, float* sums) {
    Float32 const f32;
    Sizes const& sizes = p.sizes;
    Stream const& stream = p.stream[row.which];
    auto const* packed = row_of<T>(stream.qkv, row);
    auto* dpacked = row_of<T>(stream.dqkv, row);
    if (row.rotated) lay_out(scratch.angles, p, row);
    for (int i = 0; i < 2; ++i) {
        for_each_vector(sizes.D, [&](int64_t d, int, auto lanes) {
            set(scratch.weight, d, load_lanes(f32, stream.weights[i] + d, lanes));
            set(scratch.dweight, d, Vec{});
        });
        auto const run = row.rotated ? backward_heads<T, true> : backward_heads<T, false>;
        run(p, scratch.angles, scratch.weight, row_of<T>(p.gradient[i], row), p.gradient[i].stride_n, packed,
            dpacked, scratch.dweight);
        // The heads of a row are added up first: sums of few numbers lose few digits.
        for (int64_t d = 0; d < sizes.D; ++d) sums[i * sizes.D + d] += scratch.dweight.at[d];
        packed += sizes.N * sizes.D;
        dpacked += sizes.N * sizes.D;
    }
    copy_heads<T>(dpacked, sizes.D, row_of<T>(p.gradient[2], row), p.gradient[2].stride_n, sizes);
}

// Chunks are numbered over the rows of all samples; each adds up its rows in order in its part of `partials`.
template <class T>
void backward_chunks(BackwardParams const& p, int64_t begin, int64_t end) {
    int64_t const rows = p.sizes.B * p.sizes.L;
    int64_t const per_stream = 2 * p.sizes.D;
    BackwardScratch scratch;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        int64_t const first = chunk * p.chunk_rows;
        int64_t const last = first + p.chunk_rows < rows ? first + p.chunk_rows : rows;
        float* sums = p.partials + chunk * p.streams * per_stream;
        std::memset(sums, 0, size_t(p.streams * per_stream) * sizeof(float));
        for (int64_t index = first; index < last; ++index) {
            Row const row = locate(p, index);
            backward_row<T>(p, row, scratch, sums + row.which * per_stream);
        }
    }
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
