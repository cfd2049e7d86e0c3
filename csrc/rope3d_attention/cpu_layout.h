// How backward takes the heads of a sample in parts: whose queries see which keys, and who comes after whom.
#pragma once

#include <cstdint>
#include <vector>

namespace hunyuan_fast::rope3d_attention {

// Rows of all tiles are padded to a multiple of this, so that groups of 6 and of 8 rows come out even.
constexpr int64_t kRows = 24;

// Most queries and keys at once.
struct Tiles {
    int64_t queries;
    int64_t keys;
};

// Tokens of a sample: [first, first + count), or those of these numbers.
struct Places {
    int64_t first = 0;
    int64_t count = 0;
    int64_t const* index = nullptr;

    int64_t operator[](int64_t i) const { return index ? index[i] : first + i; }
    Places part(int64_t from, int64_t size) const {
        return {index ? 0 : first + from, size, index ? index + from : nullptr};
    }
};

// Queries that see the same keys, in tiles of `queries_at_once`.
struct Askers {
    Places queries;
    int64_t first_tile = 0;
    int32_t chunks = 0;  // that have keys they see
};

// Keys of a chunk that the same queries see; `at` is their place in its memory, in rows.
struct Segment {
    Places keys;
    int64_t at = 0;
};

// Askers that see some segments of a chunk.
struct Visit {
    int32_t askers = 0;
    int32_t turn = 0;       // so many chunks come to these tiles before
    uint32_t segments = 0;  // a bit for each
};

// The keys of a chunk, and who sees them, in the order of the tiles.
struct Part {
    std::vector<Segment> segments;
    std::vector<Visit> visits;
};

struct Layout {
    std::vector<Askers> askers;
    std::vector<Part> parts;
    int64_t tokens = 0;  // of the sample: queries are numbers below
    int64_t tiles = 0;   // of all askers
    int64_t queries_at_once = 0;
    int64_t keys_at_once = 0;  // rows of memory of the largest part
    int64_t scores = 0;
};

// Keys that the same queries see, and the numbers of these askers, rising.
struct Seen {
    Places keys;
    std::vector<int32_t> by;
};

// queries: of each group of askers, none of them empty. Keys that few queries see share a chunk.
Layout layout_of(int64_t tokens, std::vector<Places> const& queries, std::vector<Seen> const& keys, Tiles most);

}  // namespace hunyuan_fast::rope3d_attention
