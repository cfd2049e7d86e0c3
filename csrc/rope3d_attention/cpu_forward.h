// A block of queries against the keys of its head, some at a time, with running maxima and sums.
#pragma once

#include "rope3d_attention/cpu.h"
#include "rope3d_attention/cpu_pack.h"

namespace hunyuan_fast::rope3d_attention::HUNYUAN_FAST_ISA {

// e^-104 is zero; what is further down would leave the range of exp2_of_product.
constexpr float kLowestPower = -104.0f;

template <class T>
inline Vec exp(T, Vec v) {
    return exp2_of_product<sizeof(typename T::Storage) == 2>(at_least(v, kLowestPower), Vec{} + kLog2E);
}

// The larger of each lane; where either is NaN, the second or NaN.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_max_ps(kAll, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

inline VecInt lane_numbers() {
    VecInt lane{};
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return lane;
}

// `other` in every lane from `count` on.
inline Vec keep_or(Vec v, int64_t count, float other) {
    return lane_numbers() < (VecInt{} + int32_t(count)) ? v : Vec{} + other;
}

// What a row of queries has seen so far: the highest score, before it is scaled, and its sums of
// e^(scale (score - that)). The difference comes first: what is highest then weighs exactly 1.
struct Running {
    float* highest;
    float* keep;  // what the last keys leave of earlier results
    float* sums;  // kLanes of each row
};

// Words of probabilities of two vectors of scores.
template <class T>
inline void write_probabilities(T, float* row, int64_t key, Vec a, Vec b) {
    store_as(row + key, a);
    store_as(row + key + kLanes, b);
}
#if defined(__AVX512BF16__)
inline Vec in_order(Vec a, Vec b) { return (Vec)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
inline void write_probabilities(BFloat16, float* row, int64_t key, Vec a, Vec b) {
    store_as(row + key / 2, in_order(a, b));
}
#endif

inline Vec highest_of(float const* scores, int64_t count) {
    Vec highest = Vec{} - __builtin_inff();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) highest = larger(load_as<Vec>(scores + i), highest);
    if (i < count) highest = larger(keep_or(load_as<Vec>(scores + i), count - i, -__builtin_inff()), highest);
    return highest;
}

// Of up to kLanes rows what is highest now, and what that leaves of earlier results.
inline void raise(float const* scores, int64_t row, int64_t rows, int64_t count, float scale, float* highest,
                  float* keep) {
    Vec lanes[kLanes] = {};
    for (int64_t i = 0; i < rows; ++i) lanes[i] = highest_of(scores + i * row, count);
    transpose(lanes);
    Vec const before = load_as<Vec>(highest);
    Vec now = before;
    for (Vec const& each : lanes) now = larger(each, now);
    store_as(highest, now);
    store_as(keep, exp(Float32{}, (before - now) * scale));
}

// Scores of `rows` queries become probabilities, up to a factor for each row that is known at the end; in place,
// where those of pairs take the first half of a row. Rows of scores hold an even number of vectors.
template <class T>
inline void exponentiate(T type, float* scores, int64_t row, int64_t rows, int64_t count, float scale,
                         Running const& running) {
    for (int64_t i = 0; i < rows; ++i, scores += row) {
        if (i % kLanes == 0) {
            raise(scores, row, least(kLanes, rows - i), count, scale, running.highest + i, running.keep + i);
        }
        float const highest = running.highest[i];
        Vec sum = load_as<Vec>(running.sums + i * kLanes) * running.keep[i];
        for (int64_t key = 0; key < count; key += 2 * kLanes) {
            Vec a = exp(type, (load_as<Vec>(scores + key) - highest) * scale);
            Vec b = exp(type, (load_as<Vec>(scores + key + kLanes) - highest) * scale);
            if (key + 2 * kLanes > count) {
                a = keep_lanes(a, count - key);
                b = keep_lanes(b, count - key - kLanes);
            }
            sum += a + b;
            write_probabilities(type, scores, key, a, b);
        }
        store_as(running.sums + i * kLanes, sum);
    }
}

template <class T>
inline void finish(ForwardParams const& p, Block const& block, float* out, int64_t row, float scale,
                   Running const& running) {
    float* const lse = p.lse + (block.b * p.sizes.N + block.n) * p.sizes.L;
    for (int64_t i = 0; i < block.queries.count; ++i) {
        double const sum = sum_lanes(load_as<Vec>(running.sums + i * kLanes));
        lse[block.queries[i]] = float(double(running.highest[i]) * double(scale) + __builtin_log(sum));
        running.keep[i] = float(1 / sum);
    }
    write_rows(T{}, out, row, tokens_of<T>(p.out, block.b, block.n, block.queries, p.sizes.D),
               [&](int64_t i) { return running.keep[i]; });
}

// Features of the heads that sizes were tried with.
constexpr int64_t kTunedFor = 128;

// The memory of a block; `keys` at once. Scores are made for some of the queries at a time, in little memory, while
// keys and values that are packed once serve all of the block. Wider heads have few queries in a block.
template <class T>
struct ForwardRoom {
    static constexpr int64_t kScored = 2 * kRows;
    int64_t rows, scored, scores_row, words, columns;
    float *q, *k, *v, *scores, *out;
    Running running;

    ForwardRoom(Room& room, int64_t D, int64_t queries, int64_t keys)
        : rows(round_up(queries, kRows)),
          scored(D > kTunedFor ? rows : least(rows, kScored)),
          scores_row(round_up(keys, 2 * kLanes)),
          words(round_up(words_of<T>(D), kLanes)),
          columns(round_up(D, kLanes)),
          q(room.take(scored * words)),
          k(room.take(words * scores_row)),
          v(room.take(words_of<T>(scores_row) * columns)),
          scores(room.take(scored * scores_row)),
          out(room.take(rows * columns)),
          running{room.take(round_up(rows, kLanes)), room.take(round_up(rows, kLanes)), room.take(rows * kLanes)} {}
};

template <class T>
int64_t forward_room(int64_t D, int64_t queries, int64_t keys) {
    Room room(nullptr);
    ForwardRoom<T>(room, D, queries, keys);
    return room.taken();
}

// Changes the signs of all numbers in so many words.
template <class T>
inline void negate(float* words, int64_t count) {
    uint32_t const signs = kPerWord<T> == 2 ? 0x80008000u : 0x80000000u;
    for (int64_t i = 0; i < count; i += kLanes) store_as(words + i, load_as<VecBits>(words + i) ^ signs);
}

// Sums over the packed keys are added to those of some queries, from `first` on in the block. Values are packed when
// the first ones need them, queries once where there is room for all.
template <class T>
inline void attend_packed(Tokens<T> const& q, int64_t first, Tokens<T> const& v, float scale, Before before,
                          ForwardRoom<T> const& room) {
    int64_t const padded = round_up(q.count, kRows);
    Running const running{room.running.highest + first, room.running.keep + first,
                          room.running.sums + first * kLanes};
    if (before == Before::ignored || room.scored < room.rows) {
        pack_rows(q, padded, room.q);
        // with a negative scale, the other way round
        if (scale < 0) negate<T>(room.q, padded * room.words);
    }
    multiply<T>({room.q, room.words, 1}, q.count, room.k, words_of<T>(q.D), Panels(v.count),
                {room.scores, room.scores_row});
    exponentiate(T{}, room.scores, room.scores_row, q.count, v.count, __builtin_fabsf(scale), running);
    if (first == 0) pack_depth(T{}, v, room.v);
    multiply<T>({room.scores, room.scores_row, 1}, q.count, room.v, words_of<T>(v.count), Panels(q.D),
                {room.out + first * room.columns, room.columns, before, running.keep});
}

// All queries of a block against the keys that they see, `at_once` of them at a time.
template <class T>
inline void attend(Tokens<T> const& q, Tokens<T> const& k, Tokens<T> const& v, int64_t at_once, float scale,
                   ForwardRoom<T> const& room) {
    // finite: where all scores so far are -inf, their differences to it are too, and not NaN
    for (int64_t i = 0; i < room.rows; ++i) room.running.highest[i] = -__FLT_MAX__;
    std::memset(room.running.sums, 0, size_t(room.rows * kLanes) * sizeof(float));
    for (int64_t key = 0; key < k.count; key += at_once) {
        int64_t const count = least(at_once, k.count - key);
        pack_columns(k.part(key, count), room.k);
        for (int64_t first = 0; first < q.count; first += room.scored) {
            attend_packed(q.part(first, least(room.scored, q.count - first)), first, v.part(key, count), scale,
                          key ? Before::scaled : Before::ignored, room);
        }
    }
}

template <class T>
void forward(ForwardParams const& p, Block const& block, float* memory) {
    int64_t const D = p.sizes.D;
    Room whole(memory);
    ForwardRoom<T> const room(whole, D, block.queries.count, block.keys_at_once);
    attend(tokens_of<T>(p.q, block.b, block.n, block.queries, D), tokens_of<T>(p.k, block.b, block.n, block.keys, D),
           tokens_of<T>(p.v, block.b, block.n, block.keys, D), block.keys_at_once, p.scale, room);
    finish<T>(p, block, room.out, room.columns, __builtin_fabsf(p.scale), room.running);
}

}  // namespace hunyuan_fast::rope3d_attention::HUNYUAN_FAST_ISA
