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

// The memory of a chunk; `queries` at once.
template <class T>
struct BackwardRoom {
    int64_t rows, keys, scores_row, words, columns;
    float *k, *v, *k_depth, *q, *dout, *q_depth, *dout_depth, *scores, *gradients, *dq, *dk, *dv;
    Rows known;

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
          known{room.take(rows), room.take(round_up(rows, kLanes))} {}
};

template <class T>
int64_t backward_room(int64_t D, int64_t queries, int64_t keys) {
    Room room(nullptr);
    BackwardRoom<T>(room, D, queries, keys);
    return room.taken();
}

// Queries [first, first + count) of the head of the chunk, packed, with what is known of them.
template <class T>
inline void pack_queries(BackwardParams const& p, Chunk const& chunk, int64_t first, int64_t count,
                         BackwardRoom<T> const& room) {
    int64_t const D = p.sizes.D;
    auto const q = tokens_of<T>(p.q, chunk.b, chunk.n, first, count, D);
    auto const dout = tokens_of<T>(p.dout, chunk.b, chunk.n, first, count, D);
    auto const out = tokens_of<T>(p.out, chunk.b, chunk.n, first, count, D);
    pack_rows(q, room.rows, room.q);
    pack_rows(dout, room.rows, room.dout);
    pack_depth(T{}, q, room.q_depth);
    pack_depth(T{}, dout, room.dout_depth);
    float const* const lse = p.lse + (chunk.b * p.sizes.N + chunk.n) * p.sizes.L + first;
    for (int64_t i = 0; i < room.rows; ++i) room.known.lse[i] = i < count ? lse[i] : 0.0f;
    // a row that has seen no key has no probabilities
    for (int64_t i = 0; i < count; ++i) {
        if (lse[i] == -__builtin_inff()) room.known.lse[i] = __builtin_inff();
    }
    for (int64_t i = 0; i < count; i += kLanes) store_as(room.known.delta + i, dots(T{}, dout, out, i));
}

// Adds the part of the chunk to dq of the tile, and writes it where it is the last one.
template <class T>
inline void add_to_dq(BackwardParams const& p, Chunk const& chunk, int64_t tile, int64_t count, Left const& weights,
                      BackwardRoom<T> const& room) {
    float* const dq = chunk.dq ? chunk.dq + tile * room.rows * room.columns : room.dq;
    if (chunk.index) wait_for(chunk.done + tile, chunk.index);
    multiply<T>(weights, count, room.k_depth, words_of<T>(chunk.count), Panels(p.sizes.D),
                {dq, room.columns, chunk.index ? Before::added : Before::ignored});
    if (chunk.is_last) {
        write_rows(T{}, dq, room.columns, count, p.sizes.D,
                   head_of<T>(p.dq, chunk.b, chunk.n, tile * chunk.queries_at_once), p.dq.stride_l,
                   [&](int64_t) { return p.scale; });
    } else {
        __atomic_store_n(chunk.done + tile, chunk.index + 1, __ATOMIC_RELEASE);
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
        pack_queries(p, chunk, first, count, room);
        multiply<T>({room.q, room.words, 1}, count, room.k, words, keys, {room.scores, room.scores_row});
        multiply<T>({room.dout, room.words, 1}, count, room.v, words, keys, {room.gradients, room.scores_row});
        Weights const weights = weigh(T{}, room.scores, room.gradients, room.scores_row, count, chunk.count,
                                      p.scale, room.known);
        Before const before = tile ? Before::added : Before::ignored;
        multiply<T>(weights.for_dv, chunk.count, room.dout_depth, words_of<T>(count), features,
                    {room.dv, room.columns, before});
        multiply<T>(weights.for_dk, chunk.count, room.q_depth, words_of<T>(count), features,
                    {room.dk, room.columns, before});
        add_to_dq(p, chunk, tile, count, weights.for_dq, room);
    }
    write_rows(T{}, room.dv, room.columns, chunk.count, D, head_of<T>(p.dv, chunk.b, chunk.n, chunk.first),
               p.dv.stride_l, [](int64_t) { return 1.0f; });
    write_rows(T{}, room.dk, room.columns, chunk.count, D, head_of<T>(p.dk, chunk.b, chunk.n, chunk.first),
               p.dk.stride_l, [&](int64_t) { return p.scale; });
}

}  // namespace hunyuan_fast::rope3d_attention::HUNYUAN_FAST_ISA
