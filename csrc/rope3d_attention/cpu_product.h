// Products of small matrices whose operands lie packed in the caches: C = A B, or added to C.
//
// Their depth is counted in words of 32 bits. A word is one float, or where the processor multiplies pairs of
// bfloat16 (`kPerWord` of the type is 2) two neighbours along the depth. The sums of a group of rows and a panel of
// columns stay in registers while the depth passes.
#pragma once

#include "common/simd_math.h"

namespace hunyuan_fast::rope3d_attention::HUNYUAN_FAST_ISA {

using namespace hunyuan_fast::HUNYUAN_FAST_ISA;

template <class T>
constexpr int kPerWord = 1;

// The word in all lanes, its bits untouched: as a float it may be anything.
inline Vec everywhere(float const* word) {
#if defined(__AVX512F__)
    return (Vec)_mm512_set1_ps(*word);
#elif defined(__AVX2__)
    return (Vec)_mm256_set1_ps(*word);
#else
    return Vec{*word, *word, *word, *word};
#endif
}

template <class T>
inline Vec multiply_add(T, Vec a, Vec b, Vec sum) {
    return a * b + sum;
}

#if defined(__AVX512BF16__)
template <>
constexpr int kPerWord<BFloat16> = 2;

inline Vec multiply_add(BFloat16, Vec a, Vec b, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
}
#endif

// With AVX-512 24 of the 32 registers hold sums, else 12 of 16.
constexpr int kMostVectors = kLanes == 16 ? 4 : 2;
constexpr int rows_for(int vectors) { return vectors == kMostVectors ? 6 : 8; }
// A panel of B of this depth stays in the first-level cache while the rows of A pass.
constexpr int64_t kDepth = 128;
inline int64_t parts_of(int64_t depth) { return (depth + kDepth - 1) / kDepth; }
inline int64_t first_of(int64_t part, int64_t parts, int64_t depth) { return depth * part / parts; }

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
template <class T>
inline int64_t words_of(int64_t elements) {
    return (elements + kPerWord<T> - 1) / kPerWord<T>;
}

// The columns of B or C in vectors, in panels of about equal width. Packed, B is (panel, depth, columns of the panel).
struct Panels {
    int64_t vectors;
    int64_t count;

    explicit Panels(int64_t columns)
        : vectors((columns + kLanes - 1) / kLanes), count((vectors + kMostVectors - 1) / kMostVectors) {}
    int64_t first(int64_t panel) const { return panel * vectors / count; }
    int width(int64_t panel) const { return int(first(panel + 1) - first(panel)); }
};

// A, of any strides in words.
struct Left {
    float const* data;
    int64_t row;
    int64_t step;
};

// What becomes of the C that was there: nothing, it is added, or it is multiplied by keep[row] and added.
enum class Before { ignored, added, scaled };

struct Result {
    float* data;
    int64_t row;
    Before before = Before::ignored;
    float const* keep = nullptr;
};

// Rows [row, row + kR) and one panel; b and c are at its first column.
template <class T, int kR, int kV>
inline void multiply_tile(Left const& a, int64_t row, float const* b, int64_t depth, Result const& c, float* to) {
    Vec sums[kR][kV] = {};
    float const* x[kR];
    for (int r = 0; r < kR; ++r) x[r] = a.data + (row + r) * a.row;
    for (int64_t at = 0; at < depth * a.step; at += a.step, b += kV * kLanes) {
        Vec columns[kV];
        for (int v = 0; v < kV; ++v) columns[v] = load_as<Vec>(b + v * kLanes);
        for (int r = 0; r < kR; ++r) {
            Vec const each = everywhere(x[r] + at);
            for (int v = 0; v < kV; ++v) sums[r][v] = multiply_add(T{}, each, columns[v], sums[r][v]);
        }
    }
    to += row * c.row;
    for (int r = 0; r < kR; ++r, to += c.row) {
        for (int v = 0; v < kV; ++v) {
            float* const at = to + v * kLanes;
            switch (c.before) {
                case Before::ignored: break;
                case Before::added: sums[r][v] += load_as<Vec>(at); break;
                case Before::scaled: sums[r][v] += load_as<Vec>(at) * c.keep[row + r]; break;
            }
            store_as(at, sums[r][v]);
        }
    }
}

template <class T, int kV>
inline void multiply_panel(Left const& a, int64_t rows, float const* b, int64_t depth, Result const& c, float* to) {
    constexpr int kR = rows_for(kV);
    for (int64_t row = 0; row < rows; row += kR) multiply_tile<T, kR, kV>(a, row, b, depth, c, to);
}

// Rows in multiples of a group are read and written: operands have kRows more or less, whatever they hold.
template <class T>
inline void multiply(Left a, int64_t rows, float const* b, int64_t depth, Panels const& panels, Result c) {
    int64_t const parts = parts_of(depth);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
        Left left = a;
        Result result = c;
        for (int64_t part = 0; part < parts; ++part) {
            int64_t const words = first_of(part + 1, parts, depth) - first_of(part, parts, depth);
            float* const to = c.data + panels.first(panel) * kLanes;
            switch (panels.width(panel)) {
                case 1: multiply_panel<T, 1>(left, rows, b, words, result, to); break;
                case 2: multiply_panel<T, 2>(left, rows, b, words, result, to); break;
#if defined(__AVX512F__)
                case 3: multiply_panel<T, 3>(left, rows, b, words, result, to); break;
                default: multiply_panel<T, 4>(left, rows, b, words, result, to);
#endif
            }
            b += words * panels.width(panel) * kLanes;
            left.data += words * a.step;
            result.before = Before::added;
        }
    }
}

}  // namespace hunyuan_fast::rope3d_attention::HUNYUAN_FAST_ISA
