// The row kernels for a CPU, compiled once per instruction set by cpu_<isa>.cpp.
//
// Memory is the floor: a row of x is read from it once, its further passes find it in the first-level
// cache. The variance takes a pass of its own, over centred values: a large offset of x cannot spoil it.
#pragma once

#include <cmath>

#include "common/simd.h"
#include "fused_modulation/cpu.h"

namespace hunyuan_fast::fused_modulation::HUNYUAN_FAST_ISA {

using namespace hunyuan_fast::HUNYUAN_FAST_ISA;

// Independent sums, so that consecutive additions do not wait for each other.
constexpr int kSums = 4;
constexpr int64_t kBlock = kSums * kLanes;

struct Sum {
    Vec part[kSums] = {};
    double mean(int64_t count) const {
        return sum_lanes((part[0] + part[1]) + (part[2] + part[3])) / double(count);
    }
};

template <class T>
inline typename T::Storage* row_of(Rows const& rows, int64_t b, int64_t l) {
    return static_cast<typename T::Storage*>(rows.data) + b * rows.stride_b + l * rows.stride_l;
}

inline float const* vector_of(Vectors const& vectors, int64_t b) {
    return static_cast<float const*>(vectors.data) + b * vectors.stride_b;
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
void forward_row(ForwardParams const& p, int64_t b, int64_t l) {
    T const type;
    Float32 const f32;
    int64_t const E = p.sizes.E;
    auto const* x = row_of<T>(p.x, b, l);
    auto* y = row_of<T>(p.y, b, l);
    float const* shift = vector_of(p.shift, b);
    float const* scale = vector_of(p.scale, b);

    Sum sum;
    for_each_vector(
        E,
        [&](int64_t e, int k) { sum.part[k] += load(type, x + e); },
        [&](int64_t e, int64_t n) { sum.part[0] += load_tail(type, x + e, n); });
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

template <class T>
void forward_rows(ForwardParams const& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) forward_row<T>(p, row / p.sizes.L, row % p.sizes.L);
}

// Writes a row of dx, and adds what the row gives to dshift and dscale.
template <class T>
void backward_row(BackwardParams const& p, int64_t b, int64_t l, float* dshift, float* dscale) {
    T const type;
    Float32 const f32;
    int64_t const E = p.sizes.E;
    auto const* x = row_of<T>(p.x, b, l);
    auto const* dy = row_of<T>(p.dy, b, l);
    auto* dx = row_of<T>(p.dx, b, l);
    float const* scale = vector_of(p.scale, b);
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
    for_each_vector(
        E,
        [&](int64_t e, int) {
            store(type, dx + e, gradient(load(type, dy + e), load(type, x + e), load(f32, scale + e)));
        },
        [&](int64_t e, int64_t n) {
            Vec const gain = load_tail(f32, scale + e, n);
            store_tail(type, dx + e, gradient(load_tail(type, dy + e, n), load_tail(type, x + e, n), gain), n);
        });
}

// Chunks are numbered over all samples; each adds up its rows in order in its own part of `partials`.
template <class T>
void backward_chunks(BackwardParams const& p, int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        int64_t const b = chunk / p.chunks;
        int64_t const first = (chunk % p.chunks) * p.chunk_rows;
        int64_t const last = first + p.chunk_rows < p.sizes.L ? first + p.chunk_rows : p.sizes.L;
        float* dshift = p.partials + chunk * 2 * p.sizes.E;
        float* dscale = dshift + p.sizes.E;
        std::memset(dshift, 0, size_t(2 * p.sizes.E) * sizeof(float));
        for (int64_t l = first; l < last; ++l) backward_row<T>(p, b, l, dshift, dscale);
    }
}

// Adds up the chunks of columns [begin, end) in order.
inline void reduce_columns(BackwardParams const& p, int64_t begin, int64_t end) {
    for (int64_t b = 0; b < p.sizes.B; ++b) {
        float* dshift = p.dshift + b * p.sizes.E;
        float* dscale = p.dscale + b * p.sizes.E;
        for (int64_t e = begin; e < end; ++e) dshift[e] = dscale[e] = 0;
        for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
            float const* part = p.partials + (b * p.chunks + chunk) * 2 * p.sizes.E;
            for (int64_t e = begin; e < end; ++e) {
                dshift[e] += part[e];
                dscale[e] += part[p.sizes.E + e];
            }
        }
    }
}

template <class T>
constexpr CpuKernels kKernels = {&forward_rows<T>, &backward_chunks<T>, &reduce_columns};

inline CpuKernels const& kernels_of(DType dtype) {
    switch (dtype) {
        case DType::f16: return kKernels<Float16>;
        case DType::bf16: return kKernels<BFloat16>;
        default: return kKernels<Float32>;
    }
}

}  // namespace hunyuan_fast::fused_modulation::HUNYUAN_FAST_ISA
