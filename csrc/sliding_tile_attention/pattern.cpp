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

// Tokens along an axis, and the first and the last of the spans that see them.
struct SeenSpan {
    Range own;
    size_t first;
    size_t last;
};

template <class AnySpan>
using Axes = std::array<std::vector<AnySpan>, 3>;

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

// Tiles that the same spans see are one.
std::vector<SeenSpan> seen_spans_of(int64_t size, int64_t tile, std::vector<Span> const& spans) {
    std::vector<SeenSpan> found;
    for (int64_t begin = 0; begin < size; begin += tile) {
        size_t first = 0, last = spans.size() - 1;
        while (spans[first].seen.after <= begin) ++first;
        while (spans[last].seen.first > begin) --last;
        int64_t const after = std::min(begin + tile, size);
        if (!found.empty() && found.back().first == first && found.back().last == last) {
            found.back().own.after = after;
        } else {
            found.push_back({{begin, after}, first, last});
        }
    }
    return found;
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

int64_t video_of(Sizes3 const& grid) { return grid[0] * grid[1] * grid[2]; }

Axes<Span> axes_of(Sizes3 const& grid, Sizes3 const& tile, Sizes3 const& window) {
    Axes<Span> axes;
    for (size_t axis = 0; axis < 3; ++axis) axes[axis] = spans_of(grid[axis], tile[axis], window[axis]);
    return axes;
}

template <class AnySpan, class Body>
void for_boxes(Axes<AnySpan> const& axes, Body const& body) {
    for (AnySpan const& t : axes[0]) {
        for (AnySpan const& h : axes[1]) {
            for (AnySpan const& w : axes[2]) body(t, h, w);
        }
    }
}

bool is_everything(Axes<Span> const& axes) { return axes[0].size() * axes[1].size() * axes[2].size() == 1; }

// The groups that see a box: those of text, which come first, and of spans with any valid token.
std::vector<int32_t> seeing(SeenSpan const& t, SeenSpan const& h, SeenSpan const& w, Axes<Span> const& axes,
                            std::vector<int32_t> const& numbers, int32_t groups_of_text) {
    std::vector<int32_t> found;
    for (int32_t number = 0; number < groups_of_text; ++number) found.push_back(number);
    for (size_t i = t.first; i <= t.last; ++i) {
        for (size_t j = h.first; j <= h.last; ++j) {
            for (size_t l = w.first; l <= w.last; ++l) {
                int32_t const number = numbers[(i * axes[1].size() + j) * axes[2].size() + l];
                if (number >= 0) found.push_back(number);
            }
        }
    }
    return found;
}

// Groups of video tokens after those of text, and the keys of the video.
void add_video(Transposed& result, Axes<Span> const& axes, Sizes3 const& grid, Sizes3 const& tile, int64_t valid) {
    auto const groups_of_text = int32_t(result.queries.size());
    std::vector<int32_t> numbers;  // of the groups of all spans; -1 where none of their tokens is valid
    for_boxes(axes, [&](Span const& t, Span const& h, Span const& w) {
        auto rows = rows_of(t.own, h.own, w.own, grid, valid);
        numbers.push_back(rows.empty() ? -1 : int32_t(result.queries.size()));
        if (!rows.empty()) result.queries.push_back(std::move(rows));
    });
    Axes<SeenSpan> seen;
    for (size_t axis = 0; axis < 3; ++axis) seen[axis] = seen_spans_of(grid[axis], tile[axis], axes[axis]);
    for_boxes(seen, [&](SeenSpan const& t, SeenSpan const& h, SeenSpan const& w) {
        auto keys = rows_of(t.own, h.own, w.own, grid, valid);
        if (keys.empty()) return;
        result.seen.push_back({std::move(keys), seeing(t, h, w, axes, numbers, groups_of_text)});
    });
}

}  // namespace

std::vector<Group> groups_of(Sizes3 const& grid, Sizes3 const& tile, Sizes3 const& window, int64_t valid) {
    int64_t const video = video_of(grid);
    std::vector<int64_t> everything;
    add_range(everything, {0, valid}, valid);
    auto const axes = axes_of(grid, tile, window);
    std::vector<Group> groups;
    if (is_everything(axes)) {
        groups.push_back({everything, everything});
        return groups;
    }
    if (valid > video) groups.push_back({{everything.begin() + video, everything.end()}, everything});
    for_boxes(axes, [&](Span const& t, Span const& h, Span const& w) {
        Group group{rows_of(t.own, h.own, w.own, grid, valid), rows_of(t.seen, h.seen, w.seen, grid, valid)};
        if (group.queries.empty()) return;
        add_range(group.keys, {video, valid}, valid);
        groups.push_back(std::move(group));
    });
    return groups;
}

Transposed transposed(Sizes3 const& grid, Sizes3 const& tile, Sizes3 const& window, int64_t valid) {
    auto const axes = axes_of(grid, tile, window);
    bool const whole = is_everything(axes);
    Transposed result;
    SeenKeys text;  // or all there is
    add_range(text.keys, {whole ? 0 : video_of(grid), valid}, valid);
    if (!text.keys.empty()) result.queries.push_back(text.keys);
    if (!whole) add_video(result, axes, grid, tile, valid);
    if (text.keys.empty()) return result;
    for (size_t number = 0; number < result.queries.size(); ++number) text.by.push_back(int32_t(number));
    result.seen.push_back(std::move(text));
    return result;
}

}  // namespace hunyuan_fast::sliding_tile_attention
