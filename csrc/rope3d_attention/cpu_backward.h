// A chunk of keys against the queries that see it: dk and dv whole, and its part of dq.
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

// What the chunks of a head share of its tokens: sum(dout * out), which the first one of a tile finds, and the lower
// halves of dq.
//
// Until it is whole, dq is kept in the tensor itself. Where that has 16 bits, they are the upper ones of the sums in
// fp32, and the lower ones lie here.
struct Shared {
    float* delta;
    uint16_t* lower;

    Shared(float* memory, int64_t tokens)
        : delta(memory), lower(reinterpret_cast<uint16_t*>(memory + round_up(tokens, 16))) {}
};

template <class T>
int64_t shared_floats(int64_t D, int64_t tokens) {
    bool const is_split = sizeof(typename T::Storage) == 2;
    return round_up(tokens, 16) + (is_split ? tokens * round_up(D, kLanes) / 2 : 0);
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

// The memory of a chunk; `queries` and `keys` at once.
template <class T>
struct BackwardRoom {
    int64_t rows, scores_row, words, columns;
    float *k, *v, *k_depth, *q, *dout, *q_depth, *dout_depth, *scores, *gradients, *dq, *dk, *dv, *lse, *delta;

    BackwardRoom(Room& room, int64_t D, int64_t queries, int64_t keys)
        : rows(round_up(queries, kRows)),
          scores_row(round_up(keys, 2 * kLanes)),
          words(round_up(words_of<T>(D), kLanes)),
          columns(round_up(D, kLanes)),
          k(room.take(words * scores_row)),
          v(room.take(words * scores_row)),
          k_depth(room.take(words_of<T>(keys) * columns)),
          q(room.take(rows * words)),
          dout(room.take(rows * words)),
          q_depth(room.take(words_of<T>(rows) * columns)),
          dout_depth(room.take(words_of<T>(rows) * columns)),
          scores(room.take(rows * scores_row)),
          gradients(room.take(rows * scores_row)),
          dq(room.take(rows * columns)),
          dk(room.take(round_up(keys, kRows) * columns)),
          dv(room.take(round_up(keys, kRows) * columns)),
          lse(room.take(rows)),
          delta(room.take(round_up(rows, kLanes))) {}

    // From a segment of the keys on.
    float* packed(float* of, Segment const& segment) const { return of + words * segment.at; }
    float* depth(Segment const& segment) const { return k_depth + words_of<T>(segment.at) * columns; }
    float* sums(float* of, Segment const& segment) const { return of + segment.at * columns; }
};

template <class T>
int64_t backward_room(int64_t D, int64_t queries, int64_t keys) {
    Room room(nullptr);
    BackwardRoom<T>(room, D, queries, keys);
    return room.taken();
}

template <class T>
inline void pack_keys(BackwardParams const& p, Chunk const& chunk, Segment const& segment,
                      BackwardRoom<T> const& room) {
    auto const k = tokens_of<T>(p.k, chunk.b, chunk.n, segment.keys, p.sizes.D);
    pack_columns(k, room.packed(room.k, segment));
    pack_depth(T{}, k, room.depth(segment));
    pack_columns(tokens_of<T>(p.v, chunk.b, chunk.n, segment.keys, p.sizes.D), room.packed(room.v, segment));
}

// The queries of a tile, packed; returns what is known of them.
template <class T>
inline Rows pack_queries(BackwardParams const& p, Chunk const& chunk, Places const& queries, bool is_first,
                         float* delta, BackwardRoom<T> const& room) {
    int64_t const count = queries.count;
    auto const q = tokens_of<T>(p.q, chunk.b, chunk.n, queries, p.sizes.D);
    auto const dout = tokens_of<T>(p.dout, chunk.b, chunk.n, queries, p.sizes.D);
    pack_rows(q, room.rows, room.q);
    pack_rows(dout, room.rows, room.dout);
    pack_depth(T{}, q, room.q_depth);
    pack_depth(T{}, dout, room.dout_depth);
    float const* const lse = p.lse + (chunk.b * p.sizes.N + chunk.n) * p.sizes.L;
    for (int64_t i = 0; i < room.rows; ++i) room.lse[i] = i < count ? lse[queries[i]] : 0.0f;
    // a row that has seen no key has no probabilities
    for (int64_t i = 0; i < count; ++i) {
        if (room.lse[i] == -__builtin_inff()) room.lse[i] = __builtin_inff();
    }
    if (is_first) {
        auto const out = tokens_of<T>(p.out, chunk.b, chunk.n, queries, p.sizes.D);
        for (int64_t i = 0; i < count; i += kLanes) store_as(room.delta + i, dots(T{}, dout, out, i));
        for (int64_t i = 0; i < count; ++i) delta[queries[i]] = room.delta[i];
    } else {
        for (int64_t i = 0; i < room.rows; ++i) room.delta[i] = i < count ? delta[queries[i]] : 0.0f;
    }
    return {room.lse, room.delta};
}

// What a segment of the keys and a tile of `count` queries give each other: dk, dv and dq grow, or begin.
template <class T>
inline void add_products(BackwardParams const& p, Segment const& segment, int64_t count, Rows const& known,
                         Before keys_before, Before queries_before, BackwardRoom<T> const& room) {
    int64_t const D = p.sizes.D, words = words_of<T>(D), keys = segment.keys.count;
    Panels const columns(keys), features(D);
    multiply<T>({room.q, room.words, 1}, count, room.packed(room.k, segment), words, columns,
                {room.scores, room.scores_row});
    multiply<T>({room.dout, room.words, 1}, count, room.packed(room.v, segment), words, columns,
                {room.gradients, room.scores_row});
    Weights const weights = weigh(T{}, room.scores, room.gradients, room.scores_row, count, keys, p.scale, known);
    multiply<T>(weights.for_dv, keys, room.dout_depth, words_of<T>(count), features,
                {room.sums(room.dv, segment), room.columns, keys_before});
    multiply<T>(weights.for_dk, keys, room.q_depth, words_of<T>(count), features,
                {room.sums(room.dk, segment), room.columns, keys_before});
    multiply<T>(weights.for_dq, count, room.depth(segment), words_of<T>(keys), features,
                {room.dq, room.columns, queries_before});
}

// Adds the part of the chunk to dq of the tile, which is whole where the chunk is the last one.
template <class T>
inline void add_to_dq(BackwardParams const& p, Chunk const& chunk, Places const& queries, bool is_first, bool is_last,
                      uint16_t* lower_halves, BackwardRoom<T> const& room) {
    int64_t const D = p.sizes.D;
    auto const to = tokens_of<T>(p.dq, chunk.b, chunk.n, queries, D);
    for (int64_t i = 0; i < queries.count; ++i) {
        auto* const dq = to.row(i);
        uint16_t* const lower = lower_halves + queries[i] * room.columns;
        for (int64_t d = 0; d < D; d += kLanes) {
            Vec sum = load_as<Vec>(room.dq + i * room.columns + d);
            if (!is_first) sum += unfinished(T{}, dq + d, lower + d, D - d);
            if (is_last) {
                store_some(T{}, dq + d, sum * p.scale, D - d);
            } else {
                keep(T{}, sum, dq + d, lower + d, D - d);
            }
        }
    }
}

// A tile of the queries that see these segments of the chunk; returns those that have begun.
template <class T>
inline uint32_t visit_tile(BackwardParams const& p, Chunk const& chunk, Visit const& visit, Places const& queries,
                           uint32_t begun, BackwardRoom<T> const& room) {
    Shared const shared(chunk.shared, chunk.layout->tokens);
    bool const is_first = visit.turn == 0;
    bool const is_last = visit.turn + 1 == chunk.layout->askers[size_t(visit.askers)].chunks;
    Rows const known = pack_queries(p, chunk, queries, is_first, shared.delta, room);
    Before before = Before::ignored;
    for (uint32_t left = visit.segments; left; left &= left - 1) {
        int const number = __builtin_ctz(left);
        Before const keys_before = begun >> number & 1 ? Before::added : Before::ignored;
        add_products(p, chunk.part->segments[size_t(number)], queries.count, known, keys_before, before, room);
        before = Before::added;
    }
    add_to_dq(p, chunk, queries, is_first, is_last, shared.lower, room);
    return begun | visit.segments;
}

template <class T>
void backward(BackwardParams const& p, Chunk const& chunk, float* memory) {
    Layout const& layout = *chunk.layout;
    int64_t const D = p.sizes.D, at_once = layout.queries_at_once;
    Room whole(memory);
    BackwardRoom<T> const room(whole, D, at_once, layout.keys_at_once);
    for (Segment const& segment : chunk.part->segments) pack_keys(p, chunk, segment, room);
    uint32_t begun = 0;
    for (Visit const& visit : chunk.part->visits) {
        Askers const& askers = layout.askers[size_t(visit.askers)];
        int64_t tile = askers.first_tile;
        for (int64_t first = 0; first < askers.queries.count; first += at_once, ++tile) {
            if (visit.turn) {
                wait_for(chunk.left + tile, visit.turn);
            } else if (chunk.before) {
                wait_for(chunk.before + tile, askers.chunks);
            }
            Places const queries = askers.queries.part(first, least(at_once, askers.queries.count - first));
            begun = visit_tile(p, chunk, visit, queries, begun, room);
            __atomic_store_n(chunk.left + tile, visit.turn + 1, __ATOMIC_RELEASE);
        }
    }
    for (Segment const& segment : chunk.part->segments) {
        write_rows(T{}, room.sums(room.dv, segment), room.columns,
                   tokens_of<T>(p.dv, chunk.b, chunk.n, segment.keys, D), [](int64_t) { return 1.0f; });
        write_rows(T{}, room.sums(room.dk, segment), room.columns,
                   tokens_of<T>(p.dk, chunk.b, chunk.n, segment.keys, D), [&](int64_t) { return p.scale; });
    }
}

}  // namespace hunyuan_fast::rope3d_attention::HUNYUAN_FAST_ISA
