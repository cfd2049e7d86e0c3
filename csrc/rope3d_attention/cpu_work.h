// Work on the CPU in parts: how large they are, and memory for each that is under way.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#include "common/parallel.h"
#include "rope3d_attention/params.h"

namespace hunyuan_fast::rope3d_attention {

constexpr int64_t kAlignment = 64;
// Packing the keys for a block costs about what so many of its queries do.
constexpr int64_t kPackingQueries = 12;
constexpr int64_t kFewestQueries = 24;

inline int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// A size for about equal parts of at most `most`, a multiple of `step`.
inline int64_t even_part(int64_t whole, int64_t most, int64_t step) {
    int64_t const parts = std::max<int64_t>(1, parts_of(whole, most));
    return std::min(most, parts_of(parts_of(whole, parts), step) * step);
}

inline int64_t aligned(int64_t floats) { return parts_of(floats, kAlignment) * kAlignment; }

class Floats {
public:
    explicit Floats(int64_t count) : memory_(new float[size_t(count + kAlignment / 4)]) {}
    float* begin() const {
        auto const address = reinterpret_cast<uintptr_t>(memory_.get());
        return memory_.get() + (kAlignment - address % kAlignment) % kAlignment / sizeof(float);
    }

private:
    std::unique_ptr<float[]> memory_;
};

// Calls body(room) on so many threads, each with its own room of so many floats; where there are fewer threads, one
// call may come after another.
template <class Body>
void run_with_rooms(int64_t threads, int64_t floats, int num_threads, Body const& body) {
    int64_t const each = aligned(floats);
    Floats const rooms(threads * each);
    parallel_for(threads, 1, num_threads, [&](int64_t i, int64_t) { body(rooms.begin() + i * each); });
}

// Calls body(index, room) for all of [0, count), in rising order.
template <class Body>
void run_with_room(int64_t count, int64_t floats, int num_threads, Body const& body) {
    std::atomic<int64_t> next{0};
    run_with_rooms(std::min<int64_t>(count, std::max(num_threads, 1)), floats, num_threads, [&](float* room) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i, room);
    });
}

// Rows [first, L) of a sample in all heads.
inline void clear_rows(Heads const& x, Sizes const& sizes, int64_t b, int64_t first, int64_t element) {
    bool const adjacent = x.stride_n == sizes.D;
    int64_t const pieces = adjacent ? 1 : sizes.N, width = adjacent ? sizes.N * sizes.D : sizes.D;
    for (int64_t l = first; l < sizes.L; ++l) {
        for (int64_t n = 0; n < pieces; ++n) {
            int64_t const at = b * x.stride_b + l * x.stride_l + n * x.stride_n;
            std::memset(static_cast<char*>(x.data) + at * element, 0, size_t(width * element));
        }
    }
}

// Queries per block: about equal ones, few enough for the caches, and so many blocks that no thread is idle long.
inline int64_t queries_per_block(int64_t length, int64_t most, int64_t heads, int64_t threads) {
    int64_t best = 0, least_time = std::numeric_limits<int64_t>::max();
    int64_t const fewest = parts_of(length, most);
    for (int64_t blocks = fewest; blocks < fewest + 8; ++blocks) {
        int64_t const queries = parts_of(length, blocks);
        if (blocks > fewest && queries < kFewestQueries) break;
        int64_t const time = parts_of(heads * blocks, threads) * (queries + kPackingQueries);
        if (time < least_time) least_time = time, best = queries;
    }
    return best;
}

}  // namespace hunyuan_fast::rope3d_attention
