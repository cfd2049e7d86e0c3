// Rows of tokens as the products read them: in floats, or in pairs of bfloat16 along the depth.
#pragma once

#include "rope3d_attention/cpu_layout.h"
#include "rope3d_attention/cpu_product.h"
#include "rope3d_attention/params.h"

namespace hunyuan_fast::rope3d_attention::HUNYUAN_FAST_ISA {

// Tokens of one head: rows of D elements, `stride` apart; with `index` those of these numbers.
template <class T>
struct Tokens {
    typename T::Storage* data;
    int64_t stride;
    int64_t count;
    int64_t D;
    int64_t const* index = nullptr;

    typename T::Storage* row(int64_t token) const { return data + (index ? index[token] : token) * stride; }
    Tokens part(int64_t first, int64_t size) const {
        return {index ? data : data + first * stride, stride, size, D, index ? index + first : nullptr};
    }
};

template <class T>
inline Vec load_some(T type, typename T::Storage const* p, int64_t count) {
    if (count >= kLanes) return load(type, p);
    return count > 0 ? load_tail(type, p, count) : Vec{};
}

template <class T>
inline void store_some(T type, typename T::Storage* p, Vec v, int64_t count) {
    if (count >= kLanes) return store(type, p, v);
    store_tail(type, p, v, count);
}

// Words [word, word + kLanes) of a row, zero past its end.
template <class T>
inline Vec row_words(T type, typename T::Storage const* row, int64_t word, int64_t D) {
    return load_some(type, row + word, D - word);
}
#if defined(__AVX512BF16__)
inline Vec row_words(BFloat16, uint16_t const* row, int64_t word, int64_t D) {
    int64_t const left = D - 2 * word;
    if (left >= 2 * kLanes) return load_as<Vec>(row + 2 * word);
    __mmask32 const mask = left > 0 ? (__mmask32(1) << left) - 1 : 0;
    return (Vec)_mm512_maskz_loadu_epi16(mask, row + 2 * word);
}
#endif

// (padded tokens, padded words): the rows as they are, zeros around them.
template <class T>
inline void pack_rows(Tokens<T> const& tokens, int64_t padded, float* to) {
    int64_t const words = round_up(words_of<T>(tokens.D), kLanes);
    for (int64_t i = 0; i < tokens.count; ++i, to += words) {
        for (int64_t w = 0; w < words; w += kLanes) store_as(to + w, row_words(T{}, tokens.row(i), w, tokens.D));
    }
    std::memset(to, 0, size_t((padded - tokens.count) * words) * sizeof *to);
}

#if defined(__AVX512F__)
// Exchanges what lies beside the diagonal: of rows i and i + kApart, the lanes kApart to the right and to the left.
template <int kApart>
inline void exchange(Vec (&square)[kLanes]) {
    VecInt low, high;
    for (int i = 0; i < kLanes; ++i) {
        low[i] = i & kApart ? kLanes + i - kApart : i;
        high[i] = i & kApart ? kLanes + i : i + kApart;
    }
    for (int i = 0; i < kLanes; ++i) {
        if (i & kApart) continue;
        __m512 const a = (__m512)square[i], b = (__m512)square[i + kApart];
        square[i] = (Vec)_mm512_permutex2var_ps(a, (__m512i)low, b);
        square[i + kApart] = (Vec)_mm512_permutex2var_ps(a, (__m512i)high, b);
    }
}
#endif

// Row i of the square becomes column i.
inline void transpose(Vec (&square)[kLanes]) {
#if defined(__AVX512F__)
    exchange<1>(square);
    exchange<2>(square);
    exchange<4>(square);
    exchange<8>(square);
#else
    for (int i = 0; i < kLanes; ++i) {
        for (int j = 0; j < i; ++j) {
            float const kept = square[i][j];
            square[i][j] = square[j][i];
            square[j][i] = kept;
        }
    }
#endif
}

// Panels of tokens as columns; the depth is along the features. Columns past the last token are zero.
template <class T>
inline void pack_columns(Tokens<T> const& tokens, float* to) {
    int64_t const words = words_of<T>(tokens.D);
    Panels const panels(tokens.count);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
        int64_t const width = panels.width(panel) * kLanes;
        for (int64_t column = 0; column < width; column += kLanes) {
            int64_t const token = panels.first(panel) * kLanes + column;
            int64_t const filled = least(kLanes, tokens.count - token);
            for (int64_t w = 0; w < words; w += kLanes) {
                Vec square[kLanes] = {};
                for (int i = 0; i < filled; ++i) square[i] = row_words(T{}, tokens.row(token + i), w, tokens.D);
                transpose(square);
                int64_t const deep = least(kLanes, words - w);
                for (int i = 0; i < deep; ++i) store_as(to + (w + i) * width + column, square[i]);
            }
        }
        to += words * width;
    }
}

// Panels of features as columns; the depth is along the tokens.
template <class T>
inline void pack_depth(T type, Tokens<T> const& tokens, float* to) {
    Panels const panels(tokens.D);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
        int64_t const first = panels.first(panel) * kLanes;
        int const width = panels.width(panel);
        for (int64_t i = 0; i < tokens.count; ++i) {
            for (int v = 0; v < width; ++v, to += kLanes) {
                int64_t const feature = first + v * kLanes;
                store_as(to, load_some(type, tokens.row(i) + feature, tokens.D - feature));
            }
        }
    }
}
#if defined(__AVX512BF16__)
// 16 features of two tokens: the first one's in the lower halves of the words.
inline Vec interleaved(uint16_t const* low, uint16_t const* high, int64_t count) {
    __mmask16 const mask = count >= kLanes ? 0xffff : __mmask16((1 << count) - 1);
    VecBits const a = widen((VecHalf)_mm256_maskz_loadu_epi16(mask, low));
    return (Vec)(high ? a | widen((VecHalf)_mm256_maskz_loadu_epi16(mask, high)) << 16 : a);
}
inline void pack_depth(BFloat16, Tokens<BFloat16> const& tokens, float* to) {
    Panels const panels(tokens.D);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
        int64_t const first = panels.first(panel) * kLanes;
        int const width = panels.width(panel);
        for (int64_t i = 0; i < tokens.count; i += 2) {
            uint16_t const* const low = tokens.row(i) + first;
            uint16_t const* const high = i + 1 < tokens.count ? tokens.row(i + 1) + first : nullptr;
            for (int v = 0; v < width; ++v, to += kLanes) {
                int64_t const at = v * kLanes;
                store_as(to, interleaved(low + at, high ? high + at : nullptr, tokens.D - first - at));
            }
        }
    }
}
#endif

// Rows of fp32 times a factor each, in the type of the tensor.
template <class T, class Factor>
inline void write_rows(T type, float const* from, int64_t stride, Tokens<T> const& to, Factor factor) {
    for (int64_t i = 0; i < to.count; ++i, from += stride) {
        float const by = factor(i);
        auto* const row = to.row(i);
        for (int64_t d = 0; d < to.D; d += kLanes) store_some(type, row + d, load_as<Vec>(from + d) * by, to.D - d);
    }
}

template <class T>
inline Tokens<T> tokens_of(Heads const& x, int64_t b, int64_t n, Places const& places, int64_t D) {
    auto* const head = static_cast<typename T::Storage*>(x.data) + b * x.stride_b + n * x.stride_n;
    if (places.index) return {head, x.stride_l, places.count, D, places.index};
    return {head + places.first * x.stride_l, x.stride_l, places.count, D};
}

// Hands out the memory of a call; without any, counts what it would hand out.
class Room {
public:
    explicit Room(float* begin) : begin_(begin) {}
    float* take(int64_t floats) {
        float* const part = begin_ ? begin_ + taken_ : nullptr;
        taken_ += round_up(floats, 16);
        return part;
    }
    int64_t taken() const { return taken_; }

private:
    float* begin_;
    int64_t taken_ = 0;
};

}  // namespace hunyuan_fast::rope3d_attention::HUNYUAN_FAST_ISA
