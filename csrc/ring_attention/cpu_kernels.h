// The kernels for a CPU, compiled once per instruction set by cpu_<isa>.cpp: row by row, in fp32.
#pragma once

#include "common/simd.h"
#include "ring_attention/cpu.h"

namespace hunyuan_fast::ring_attention::HUNYUAN_FAST_ISA {

using namespace hunyuan_fast::HUNYUAN_FAST_ISA;

// The elements of a vector that belong to the row: all of them, or the first few.
struct AllLanes {};
struct SomeLanes {
    int64_t count;
};

template <class T>
inline Vec get(T type, typename T::Storage const* p, AllLanes) {
    return load(type, p);
}
template <class T>
inline Vec get(T type, typename T::Storage const* p, SomeLanes lanes) {
    return load_tail(type, p, lanes.count);
}
template <class T>
inline void put(T type, typename T::Storage* p, Vec v, AllLanes) {
    store(type, p, v);
}
template <class T>
inline void put(T type, typename T::Storage* p, Vec v, SomeLanes lanes) {
    store_tail(type, p, v, lanes.count);
}

// Calls body(offset, lanes) for every vector of a row.
template <class Body>
inline void for_each_vector(int64_t D, Body body) {
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes) body(d, AllLanes{});
    if (d < D) body(d, SomeLanes{D - d});
}

struct Place {
    int64_t b, l, n;
};

// Calls body(place) for the rows [begin, end).
template <class Body>
inline void for_each_row(Sizes const& size, int64_t begin, int64_t end, Body body) {
    Place at{begin / size.N / size.L, begin / size.N % size.L, begin % size.N};
    for (int64_t row = begin; row < end; ++row) {
        body(at);
        if (++at.n < size.N) continue;
        at.n = 0;
        if (++at.l < size.L) continue;
        at.l = 0;
        ++at.b;
    }
}

template <class Where>
inline int64_t offset(Where const& x, Place at) {
    return at.b * x.stride_b + at.l * x.stride_l + at.n * x.stride_n;
}
template <class T>
inline typename T::Storage* row(Rows const& rows, Place at) {
    return static_cast<typename T::Storage*>(rows.data) + offset(rows, at);
}
inline float& number(Numbers const& numbers, Place at) { return numbers.data[offset(numbers, at)]; }

// share * x, or zero without reading x where the share is zero.
template <class T, class Lanes>
inline Vec counted(T type, float share, typename T::Storage const* x, Lanes lanes) {
    return share == 0.0f ? Vec{} : get(type, x, lanes) * share;
}

template <class T>
void forward(ForwardParams const& p, int64_t begin, int64_t end) {
    for_each_row(p.size, begin, end, [&](Place at) {
        Shares const s = shares_of(number(p.lse, at), number(p.part_lse, at));
        number(p.new_lse, at) = s.lse;
        float const* out = row<Float32>(p.out, at);
        auto const* part = row<T>(p.part, at);
        float* result = row<Float32>(p.new_out, at);
        if (s.first != 0.0f && s.second != 0.0f) {
            for_each_vector(p.size.D, [&](int64_t d, auto lanes) {
                Vec const first = get(Float32(), out + d, lanes) * s.first;
                put(Float32(), result + d, first + get(T(), part + d, lanes) * s.second, lanes);
            });
            return;
        }
        for_each_vector(p.size.D, [&](int64_t d, auto lanes) {
            Vec const first = counted(Float32(), s.first, out + d, lanes);
            put(Float32(), result + d, first + counted(T(), s.second, part + d, lanes), lanes);
        });
    });
}

template <class T>
void backward(BackwardParams const& p, int64_t begin, int64_t end) {
    for_each_row(p.size, begin, end, [&](Place at) {
        Shares const s = shares_of(number(p.lse, at), number(p.part_lse, at));
        float const* dout = row<Float32>(p.dout, at);
        float const* out = row<Float32>(p.out, at);
        auto const* part = row<T>(p.part, at);
        float* dfirst = row<Float32>(p.dfirst, at);
        auto* dpart = row<T>(p.dpart, at);
        bool const both = s.first != 0.0f && s.second != 0.0f;
        Vec sum{};
        for_each_vector(p.size.D, [&](int64_t d, auto lanes) {
            Vec const gradient = get(Float32(), dout + d, lanes);
            if (both) sum += gradient * (get(Float32(), out + d, lanes) - get(T(), part + d, lanes));
            put(Float32(), dfirst + d, s.first == 0.0f ? Vec{} : gradient * s.first, lanes);
            put(T(), dpart + d, s.second == 0.0f ? Vec{} : gradient * s.second, lanes);
        });
        float const dlse = p.dlse.data == nullptr ? 0.0f : number(p.dlse, at);
        float const through = both ? s.first * s.second * float(sum_lanes(sum)) : 0.0f;
        number(p.dfirst_lse, at) = (s.first == 0.0f ? 0.0f : s.first * dlse) + through;
        number(p.dpart_lse, at) = (s.second == 0.0f ? 0.0f : s.second * dlse) - through;
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

}  // namespace hunyuan_fast::ring_attention::HUNYUAN_FAST_ISA
