// A chunk of keys against all queries of its head: dk and dv whole, and its part of dq.
#pragma once

#include "rope3d_attention/cpu_forward.h"

namespace hunyuan_fast::rope3d_attention::HUNYUAN_FAST_ISA {

// Probabilities P and their gradients dS, as A of the products: over the queries for dv and dk, over the keys for dq.
struct Weights {
    Left for_dv;
    Left for_dk;
    Left for_dq;
};

// What is known of each query: its log-sum-exp, and sum(dout * out).
struct Rows {
    float* lse;
    float* delta;
};

// Of scores and of dP = dout v^T: P in place of the scores, dS in place of dP.
template <class T>
inline Weights weigh(T type, float* scores, float* gradients, int64_t row, int64_t rows, int64_t count, float scale,
                     Rows const& known) {
    for (int64_t i = 0; i < rows; ++i) {
        float* const s = scores + i * row;
        float* const g = gradients + i * row;
        for (int64_t key = 0; key < count; key += kLanes) {
            Vec const p = exp(type, load_as<Vec>(s + key) * scale - known.lse[i]);
            store_as(s + key, p);
            store_as(g + key, p * (load_as<Vec>(g + key) - known.delta[i]));
        }
    }
    return {{scores, 1, row}, {gradients, 1, row}, {gradients, row, 1}};
}
#if defined(__AVX512BF16__)
// Neighbours of two rows in one word, the first row's below.
inline Vec in_pairs(Vec low, Vec high) {
    __m512i const both = (__m512i)in_order(low, high);
    VecBits order{};
    for (int i = 0; i < kLanes; ++i) order[i] = uint32_t(i + ((i + kLanes) << 16));
    return (Vec)_mm512_permutexvar_epi16((__m512i)order, both);
}

// P over the queries lies in the even rows of `scores`, dS over the queries in the odd ones, dS over the keys in the
// first half of each row of `gradients`. Past the last key dS is zero.
inline Weights weigh(BFloat16 type, float* scores, float* gradients, int64_t row, int64_t rows, int64_t count,
                     float scale, Rows const& known) {
    for (int64_t i = 0; i < rows; i += 2) {
        for (int64_t key = 0; key < count; key += 2 * kLanes) {
            Vec p[2][2], ds[2][2];
            for (int r = 0; r < 2; ++r) {
                float const* const s = scores + (i + r) * row + key;
                float const* const g = gradients + (i + r) * row + key;
                for (int v = 0; v < 2; ++v) {
                    p[r][v] = exp(type, load_as<Vec>(s + v * kLanes) * scale - known.lse[i + r]);
                    ds[r][v] = p[r][v] * (load_as<Vec>(g + v * kLanes) - known.delta[i + r]);
                    if (key + (v + 1) * kLanes > count) ds[r][v] = keep_lanes(ds[r][v], count - key - v * kLanes);
                }
            }
            for (int v = 0; v < 2; ++v) {
                store_as(scores + i * row + key + v * kLanes, in_pairs(p[0][v], p[1][v]));
                store_as(scores + (i + 1) * row + key + v * kLanes, in_pairs(ds[0][v], ds[1][v]));
            }
            for (int r = 0; r < 2; ++r) store_as(gradients + (i + r) * row + key / 2, in_order(ds[r][0], ds[r][1]));
        }
    }
    return {{scores, 1, 2 * row}, {scores + row, 1, 2 * row}, {gradients, row, 1}};
}
#endif

// Products of rows [first, first + kLanes) of a with those of b, summed exactly as `multiply` does: where a query sees
// a single key, dP - delta is 0 and not a rounding error.
template <class T>
inline Vec dots(T type, Tokens<T> const& a, Tokens<T> const& b, int64_t first) {
    int64_t const words = words_of<T>(a.D), parts = parts_of(words), filled = least(kLanes, a.count - first);
    Vec total{}, sum{};
    int64_t part = 1;
    for (int64_t w = 0; w < words; w += kLanes) {
        Vec x[kLanes] = {}, y[kLanes] = {};
        for (int i = 0; i < filled; ++i) x[i] = row_words(type, a.row(first + i), w, a.D);
        for (int i = 0; i < filled; ++i) y[i] = row_words(type, b.row(first + i), w, b.D);
        transpose(x);
        transpose(y);
        for (int i = 0; i < least(kLanes, words - w); ++i) {
            if (w + i == first_of(part, parts, words)) total += sum, sum = Vec{}, ++part;
            sum = multiply_add(type, x[i], y[i], sum);
        }
    }
    return total + sum;
}

// What the chunks of a head share of a tile: sum(dout * out), which the first one finds, and the lower halves of dq.
//
// Until it is whole, dq is kept in the tensor itself. Where that has 16 bits, they are the upper ones of the sums in
// fp32, and the lower ones lie here.
template <class T>
struct Shared {
    float* delta;
    uint16_t* lower;

    Shared(float* memory, int64_t queries)
        : delta(memory), lower(reinterpret_cast<uint16_t*>(memory + round_up(queries, 16))) {}
};

template <class T>
int64_t shared_floats(int64_t D, int64_t queries) {
    bool const is_split = sizeof(typename T::Storage) == 2;
    return round_up(queries, 16) + (is_split ? queries * round_up(D, kLanes) / 2 : 0);
}

inline Vec unfinished(Float32 type, float const* dq, uint16_t const*, int64_t count) {
    return load_some(type, dq, count);
}
template <class T>
inline Vec unfinished(T, uint16_t const* dq, uint16_t const* lower, int64_t count) {
    VecBits const upper = (VecBits)load_some(BFloat16{}, dq, count);
    return (Vec)(upper | widen(load_as<VecHalf>(lower)));
}

inline void keep(Float32 type, Vec sum, float* dq, uint16_t*, int64_t count) { store_some(type, dq, sum, count); }
template <class T>
inline void keep(T, Vec sum, uint16_t* dq, uint16_t* lower, int64_t count) {
    VecBits const bits = (VecBits)sum;
    VecHalf const upper = narrow(bits >> 16);
    store_as(lower, narrow(bits & 0xffffu));
    if (count >= kLanes) return store_as(dq, upper);
    std::memcpy(dq, &upper, size_t(count) * sizeof *dq);
}

// The memory of a chunk; `queries` at once.
template <class T>
struct BackwardRoom {
    int64_t rows, keys, scores_row, words, columns;
    float *k, *v, *k_depth, *q, *dout, *q_depth, *dout_depth, *scores, *gradients, *dq, *dk, *dv, *lse;

    BackwardRoom(Room& room, int64_t D, int64_t queries, int64_t count)
        : rows(round_up(queries, kRows)),
          keys(round_up(count, kRows)),
          scores_row(round_up(keys, 2 * kLanes)),
          words(round_up(words_of<T>(D), kLanes)),
          columns(round_up(D, kLanes)),
          k(room.take(words * scores_row)),
          v(room.take(words * scores_row)),
          k_depth(room.take(words_of<T>(count) * columns)),
          q(room.take(rows * words)),
          dout(room.take(rows * words)),
          q_depth(room.take(words_of<T>(rows) * columns)),
          dout_depth(room.take(words_of<T>(rows) * columns)),
          scores(room.take(rows * scores_row)),
          gradients(room.take(rows * scores_row)),
          dq(room.take(rows * columns)),
          dk(room.take(keys * columns)),
          dv(room.take(keys * columns)),
          lse(room.take(rows)) {}
};

template <class T>
int64_t backward_room(int64_t D, int64_t queries, int64_t keys) {
    Room room(nullptr);
    BackwardRoom<T>(room, D, queries, keys);
    return room.taken();
}

// The queries of a tile of the head of the chunk, packed; returns what is known of them.
template <class T>
inline Rows pack_queries(BackwardParams const& p, Chunk const& chunk, int64_t first, int64_t count, float* delta,
                         BackwardRoom<T> const& room) {
    int64_t const D = p.sizes.D;
    auto const q = tokens_of<T>(p.q, chunk.b, chunk.n, first, count, D);
    auto const dout = tokens_of<T>(p.dout, chunk.b, chunk.n, first, count, D);
    pack_rows(q, room.rows, room.q);
    pack_rows(dout, room.rows, room.dout);
    pack_depth(T{}, q, room.q_depth);
    pack_depth(T{}, dout, room.dout_depth);
    float const* const lse = p.lse + (chunk.b * p.sizes.N + chunk.n) * p.sizes.L + first;
    for (int64_t i = 0; i < room.rows; ++i) room.lse[i] = i < count ? lse[i] : 0.0f;
    // a row that has seen no key has no probabilities
    for (int64_t i = 0; i < count; ++i) {
        if (lse[i] == -__builtin_inff()) room.lse[i] = __builtin_inff();
    }
    if (chunk.is_first) {
        auto const out = tokens_of<T>(p.out, chunk.b, chunk.n, first, count, D);
        for (int64_t i = 0; i < count; i += kLanes) store_as(delta + i, dots(T{}, dout, out, i));
    }
    return {room.lse, delta};
}

// Adds the part of the chunk to dq of the tile, which is whole where the chunk is the last one.
template <class T>
inline void add_to_dq(BackwardParams const& p, Chunk const& chunk, int64_t first, int64_t count, Left const& weights,
                      uint16_t* lower, BackwardRoom<T> const& room) {
    int64_t const D = p.sizes.D;
    multiply<T>(weights, count, room.k_depth, words_of<T>(chunk.count), Panels(D), {room.dq, room.columns});
    auto* dq = head_of<T>(p.dq, chunk.b, chunk.n, first);
    for (int64_t i = 0; i < count; ++i, dq += p.dq.stride_l, lower += room.columns) {
        for (int64_t d = 0; d < D; d += kLanes) {
            Vec sum = load_as<Vec>(room.dq + i * room.columns + d);
            if (!chunk.is_first) sum += unfinished(T{}, dq + d, lower + d, D - d);
            if (chunk.is_last) {
                store_some(T{}, dq + d, sum * p.scale, D - d);
            } else {
                keep(T{}, sum, dq + d, lower + d, D - d);
            }
        }
    }
}

template <class T>
void backward(BackwardParams const& p, Chunk const& chunk, float* memory) {
    int64_t const D = p.sizes.D, queries = p.queries[chunk.b], words = words_of<T>(D);
    Room whole(memory);
    BackwardRoom<T> const room(whole, D, chunk.queries_at_once, chunk.count);
    auto const k = tokens_of<T>(p.k, chunk.b, chunk.n, chunk.first, chunk.count, D);
    pack_columns(k, room.k);
    pack_depth(T{}, k, room.k_depth);
    pack_columns(tokens_of<T>(p.v, chunk.b, chunk.n, chunk.first, chunk.count, D), room.v);

    Panels const keys(chunk.count), features(D);
    for (int64_t tile = 0; tile * chunk.queries_at_once < queries; ++tile) {
        int64_t const first = tile * chunk.queries_at_once;
        int64_t const count = least(chunk.queries_at_once, queries - first);
        if (chunk.before) wait_for(chunk.before, int32_t(tile + 1));
        Shared<T> const shared(chunk.shared + tile * shared_floats<T>(D, room.rows), room.rows);
        Rows const known = pack_queries(p, chunk, first, count, shared.delta, room);
        multiply<T>({room.q, room.words, 1}, count, room.k, words, keys, {room.scores, room.scores_row});
        multiply<T>({room.dout, room.words, 1}, count, room.v, words, keys, {room.gradients, room.scores_row});
        Weights const weights = weigh(T{}, room.scores, room.gradients, room.scores_row, count, chunk.count,
                                      p.scale, known);
        Before const before = tile ? Before::added : Before::ignored;
        multiply<T>(weights.for_dv, chunk.count, room.dout_depth, words_of<T>(count), features,
                    {room.dv, room.columns, before});
        multiply<T>(weights.for_dk, chunk.count, room.q_depth, words_of<T>(count), features,
                    {room.dk, room.columns, before});
        add_to_dq(p, chunk, first, count, weights.for_dq, shared.lower, room);
        __atomic_store_n(chunk.left, int32_t(tile + 1), __ATOMIC_RELEASE);
    }
    // which a head of fewer tiles has not seen for itself
    if (chunk.before) wait_for(chunk.before, kAllTiles);
    __atomic_store_n(chunk.left, kAllTiles, __ATOMIC_RELEASE);
    write_rows(T{}, room.dv, room.columns, chunk.count, D, head_of<T>(p.dv, chunk.b, chunk.n, chunk.first),
               p.dv.stride_l, [](int64_t) { return 1.0f; });
    write_rows(T{}, room.dk, room.columns, chunk.count, D, head_of<T>(p.dk, chunk.b, chunk.n, chunk.first),
               p.dk.stride_l, [&](int64_t) { return p.scale; });
}

}  // namespace hunyuan_fast::rope3d_attention::HUNYUAN_FAST_ISA
