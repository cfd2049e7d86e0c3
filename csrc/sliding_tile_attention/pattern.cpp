#include "sliding_tile_attention/pattern.h"

#include <algorithm>
#include <utility>

namespace hunyuan_fast::sliding_tile_attention {
namespace {

struct Range {
    int64_t first;
    int64_t after;
};

// Tokens along an axis, and what they see of it.
struct Span {
    Range own;
    Range seen;
};

std::vector<Span> spans_of(int64_t size, int64_t tile, int64_t window) {
    int64_t const count = (size + tile - 1) / tile;
    window = std::clamp<int64_t>(window, 1, count);
    int64_t const last = count - window;
    std::vector<Span> spans;
    for (int64_t first = 0; first <= last; ++first) {
        int64_t const lowest = first ? first + window / 2 : 0;
        int64_t const beyond = first < last ? first + window / 2 + 1 : count;
        spans.push_back({{lowest * tile, std::min(beyond * tile, size)},
                         {first * tile, std::min((first + window) * tile, size)}});
    }
    return spans;
}

void add_range(std::vector<int64_t>& rows, Range range, int64_t valid) {
    for (int64_t row = range.first; row < std::min(range.after, valid); ++row) rows.push_back(row);
}

std::vector<int64_t> rows_of(Range t, Range h, Range w, Sizes3 const& grid, int64_t valid) {
    std::vector<int64_t> rows;
    for (int64_t i = t.first; i < t.after; ++i) {
        for (int64_t j = h.first; j < h.after; ++j) {
            int64_t const line = (i * grid[1] + j) * grid[2];
            add_range(rows, {line + w.first, line + w.after}, valid);
        }
    }
    return rows;
}

}  // namespace

std::vector<Group> groups_of(Sizes3 const& grid, Sizes3 const& tile, Sizes3 const& window, int64_t valid) {
    int64_t const video = grid[0] * grid[1] * grid[2];
    std::vector<int64_t> everything;
    add_range(everything, {0, valid}, valid);
    std::array<std::vector<Span>, 3> axes;
    for (int axis = 0; axis < 3; ++axis) axes[axis] = spans_of(grid[axis], tile[axis], window[axis]);
    std::vector<Group> groups;
    if (axes[0].size() * axes[1].size() * axes[2].size() == 1) {
        groups.push_back({everything, everything});
        return groups;
    }
    if (valid > video) groups.push_back({{everything.begin() + video, everything.end()}, everything});
    for (Span const& t : axes[0]) {
        for (Span const& h : axes[1]) {
            for (Span const& w : axes[2]) {
                Group group{rows_of(t.own, h.own, w.own, grid, valid), rows_of(t.seen, h.seen, w.seen, grid, valid)};
                if (group.queries.empty()) continue;
                add_range(group.keys, {video, valid}, valid);
                groups.push_back(std::move(group));
            }
        }
    }
    return groups;
}

}  // namespace hunyuan_fast::sliding_tile_attention
