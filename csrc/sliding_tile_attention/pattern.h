// Who sees whom: all tokens of a sample in groups whose tokens see the same, or are seen by the same.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace hunyuan_fast::sliding_tile_attention {

using Sizes3 = std::array<int64_t, 3>;  // along T, H, W

struct Group {
    std::vector<int64_t> queries;  // rising
    std::vector<int64_t> keys;     // rising: text last
};

// Of the first `valid` tokens, video on a grid first, then text; each is a query of one group. Borders make tiles share
// what they see; a window that covers the grid leaves one group.
std::vector<Group> groups_of(Sizes3 const& grid, Sizes3 const& tile, Sizes3 const& window, int64_t valid);

// Keys that the same groups see, by their numbers.
struct SeenKeys {
    std::vector<int64_t> keys;  // rising
    std::vector<int32_t> by;    // rising
};

// The same pattern from the side of the keys, each of which is in `seen` once.
struct Transposed {
    std::vector<std::vector<int64_t>> queries;  // of each group
    std::vector<SeenKeys> seen;
};

Transposed transposed(Sizes3 const& grid, Sizes3 const& tile, Sizes3 const& window, int64_t valid);

}  // namespace hunyuan_fast::sliding_tile_attention
