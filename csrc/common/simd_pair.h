// Two vectors at a time, in the order that a type of memory gives cheapest.
//
// A word of 32 bits holds two neighbours of bfloat16. Shifts and masks within the words take them apart, where
// widening to vectors of consecutive elements moves lanes and costs three times as much, and so does narrowing.
// So a pair of vectors over 2 * kLanes elements is (even elements, odd elements) for BFloat16, and (first
// half, second half) for the other types. Sums over rows do not care; tensors that meet bfloat16 element by
// element must be in the same order: see `split`, below. What is left at the end of a row, less than a pair, is
// consecutive for every type.
#pragma once

#include "common/simd.h"
#include "common/streaming.h"

namespace hunyuan_fast::HUNYUAN_FAST_ISA {

constexpr int64_t kPair = 2 * kLanes;

struct Pair {
    Vec a{};
    Vec b{};
};

inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
inline Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
inline Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
inline Pair operator+(Pair x, float y) { return {x.a + y, x.b + y}; }
inline Pair operator-(Pair x, float y) { return {x.a - y, x.b - y}; }
inline Pair operator*(Pair x, float y) { return {x.a * y, x.b * y}; }

// bfloat16 in consecutive order, to meet float32.
struct BFloat16InOrder : BFloat16 {};

// The elements of a pair that belong to the row: all of them, or the first few.
struct Whole {};
struct Part {
    int64_t count;
};

// Calls body(offset, which of two, elements) for every pair of a row.
template <class Body>
inline void for_each_pair(int64_t E, Body body) {
    int64_t e = 0;
    for (; e + 2 * kPair <= E; e += 2 * kPair) {
        body(e, 0, Whole{});
        body(e + kPair, 1, Whole{});
    }
    if (e + kPair <= E) {
        body(e, 0, Whole{});
        e += kPair;
    }
    if (e < E) body(e, 0, Part{E - e});
}

inline Vec lower(VecBits words) { return (Vec)(words << 16); }
inline Vec upper(VecBits words) { return (Vec)(words & 0xffff0000u); }

// To nearest even in the upper half of the bits. A NaN needs no care if its lower half is empty, as in those
// that come of bfloat16 or of arithmetic.
#if defined(__AVX512F__)
inline VecBits rounded(VecBits bits) {
    __m512i const up = (__m512i)(bits + 0x7fffu);
    __mmask16 const odd = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000));
    return (VecBits)_mm512_mask_sub_epi32(up, odd, up, _mm512_set1_epi32(-1));
}
#else
inline VecBits rounded(VecBits bits) { return bits + 0x7fffu + ((bits >> 16) & 1u); }
#endif

inline VecBits joined(Pair v) {
    return (rounded((VecBits)v.a) >> 16) | (rounded((VecBits)v.b) & 0xffff0000u);
}

template <class T>
inline Pair load(T type, typename T::Storage const* p, Whole) {
    return {load(type, p), load(type, p + kLanes)};
}
inline Pair load(BFloat16, uint16_t const* p, Whole) {
    VecBits const words = load_as<VecBits>(p);
    return {lower(words), upper(words)};
}

// Writes a pair, and returns it as memory now holds it.
inline Pair store(Float32 type, float* p, Pair v, Whole) {
    store(type, p, v.a);
    store(type, p + kLanes, v.b);
    return v;
}
template <class T>
inline Pair store(T type, typename T::Storage* p, Pair v, Whole whole) {
    store(type, p, v.a);
    store(type, p + kLanes, v.b);
    return load(type, p, whole);
}
inline Pair store(BFloat16, uint16_t* p, Pair v, Whole) {
    VecBits const words = joined(v);
    store_as(p, words);
    return {lower(words), upper(words)};
}

// A store past the caches: the line is not read before it is written. The address is a multiple of
// kStreamAlignment; `finish_streams` comes before another thread reads.
#if defined(__AVX512F__)
inline void stream_bits(void* p, VecBits bits) { _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)bits); }
inline void finish_streams() { _mm_sfence(); }
#elif defined(__AVX2__)
inline void stream_bits(void* p, VecBits bits) { _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)bits); }
inline void finish_streams() { _mm_sfence(); }
#else
inline void stream_bits(void* p, VecBits bits) { std::memcpy(p, &bits, sizeof bits); }
inline void finish_streams() {}
#endif

inline void stream(Float32, float* p, Pair v, Whole) {
    stream_bits(p, (VecBits)v.a);
    stream_bits(p + kLanes, (VecBits)v.b);
}
inline void stream(BFloat16, uint16_t* p, Pair v, Whole) { stream_bits(p, joined(v)); }
template <class T, class Elements>
inline void stream(T type, typename T::Storage* p, Pair v, Elements elements) {
    store(type, p, v, elements);
}

template <class T, class Elements>
inline void write(T type, typename T::Storage* p, Pair v, Elements elements, bool streams) {
    if (streams) {
        stream(type, p, v, elements);
    } else {
        store(type, p, v, elements);
    }
}

// Copies past the caches, as `write` does; bytes a multiple of kStreamAlignment.
inline void stream_copy(void* to, void const* from, size_t bytes) {
    auto* const out = static_cast<char*>(to);
    auto const* const in = static_cast<char const*>(from);
    for (size_t i = 0; i < bytes; i += sizeof(VecBits)) {
        VecBits bits;
        std::memcpy(&bits, in + i, sizeof bits);
        stream_bits(out + i, bits);
    }
}

// Brings the elements of a pair at p into the cache, without waiting. p may point anywhere.
template <class Storage>
inline void fetch(Storage const* p) {
    for (size_t line = 0; line < kPair * sizeof *p; line += 64) {
        __builtin_prefetch(reinterpret_cast<char const*>(p) + line);
    }
}

inline int64_t first_half(Part part) { return part.count < kLanes ? part.count : int64_t(kLanes); }

template <class T>
inline Pair load(T type, typename T::Storage const* p, Part part) {
    int64_t const first = first_half(part);
    return {load_tail(type, p, first), load_tail(type, p + first, part.count - first)};
}

template <class T>
inline Pair store(T type, typename T::Storage* p, Pair v, Part part) {
    int64_t const first = first_half(part);
    store_tail(type, p, v.a, first);
    store_tail(type, p + first, v.b, part.count - first);
    return load(type, p, part);
}

// Zero in what does not belong to the row.
inline Pair keep(Pair v, Whole) { return v; }
inline Pair keep(Pair v, Part part) {
    int64_t const first = first_half(part);
    return {keep_lanes(v.a, first), keep_lanes(v.b, part.count - first)};
}

// The same numbers in another type, consecutive in both.
template <class From, class To>
inline void convert(From from_type, typename From::Storage const* from, To to_type, typename To::Storage* to,
                    int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to_type, to + i, load(from_type, from + i));
    if (i < count) store_tail(to_type, to + i, load_tail(from_type, from + i, count - i), count - i);
}

// Consecutive elements as (even, odd) ones, and back.
#if defined(__AVX512F__)
inline Pair taken_apart(Pair v) {
    VecInt even{}, odd{};
    for (int i = 0; i < kLanes; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    return {(Vec)_mm512_permutex2var_ps((__m512)v.a, (__m512i)even, (__m512)v.b),
            (Vec)_mm512_permutex2var_ps((__m512)v.a, (__m512i)odd, (__m512)v.b)};
}
inline Pair put_together(Pair v) {
    VecInt low{}, high{};
    for (int i = 0; i < kLanes; ++i) {
        low[i] = i / 2 + i % 2 * kLanes;
        high[i] = kLanes / 2 + i / 2 + i % 2 * kLanes;
    }
    return {(Vec)_mm512_permutex2var_ps((__m512)v.a, (__m512i)low, (__m512)v.b),
            (Vec)_mm512_permutex2var_ps((__m512)v.a, (__m512i)high, (__m512)v.b)};
}
#else
inline Pair taken_apart(Pair v) {
    float lanes[kPair];
    store(Float32{}, lanes, v, Whole{});
    for (int i = 0; i < kLanes; ++i) v.a[i] = lanes[2 * i], v.b[i] = lanes[2 * i + 1];
    return v;
}
inline Pair put_together(Pair v) {
    float lanes[kPair];
    for (int i = 0; i < kLanes; ++i) lanes[2 * i] = v.a[i], lanes[2 * i + 1] = v.b[i];
    return load(Float32{}, lanes, Whole{});
}
#endif

// From consecutive order to that of T, and back.
template <class T, class Elements>
inline Pair split(T, Pair v, Elements) {
    return v;
}
inline Pair split(BFloat16, Pair v, Whole) { return taken_apart(v); }

template <class T, class Elements>
inline Pair unsplit(T, Pair v, Elements) {
    return v;
}
inline Pair unsplit(BFloat16, Pair v, Whole) { return put_together(v); }

}  // namespace hunyuan_fast::HUNYUAN_FAST_ISA
