#include "rope3d_attention/cpu_layout.h"

#include <algorithm>

#include "rope3d_attention/cpu_work.h"

namespace hunyuan_fast::rope3d_attention {
namespace {

constexpr int64_t kLongestVector = 16;

// Of a segment beside others: both its groups of rows and its vectors of columns are whole.
int64_t rows_for_segment(int64_t keys) {
    return parts_of(parts_of(keys, kLongestVector) * kLongestVector, kRows) * kRows;
}

// Puts pieces into parts as they come, and notes who sees them.
class Filling {
public:
    Filling(Layout& layout, int64_t most) : layout_(layout), most_(most), seen_(layout.askers.size()) {}

    void add(Places const& keys, std::vector<int32_t> const& by) {
        int64_t const rows = rows_for_segment(keys.count);
        if (filled_ && filled_ + rows > most_) close();
        if (!filled_) layout_.parts.emplace_back();
        auto& segments = layout_.parts.back().segments;
        for (int32_t each : by) seen_[size_t(each)] |= uint32_t(1) << segments.size();
        segments.push_back({keys, filled_});
        // one by itself needs no room to the next
        layout_.keys_at_once = std::max(layout_.keys_at_once, filled_ ? filled_ + rows : keys.count);
        filled_ += rows;
    }

    void close() {
        if (!filled_) return;
        for (size_t i = 0; i < seen_.size(); ++i) {
            if (seen_[i]) layout_.parts.back().visits.push_back({int32_t(i), layout_.askers[i].chunks++, seen_[i]});
            seen_[i] = 0;
        }
        filled_ = 0;
    }

private:
    Layout& layout_;
    int64_t const most_;
    int64_t filled_ = 0;
    std::vector<uint32_t> seen_;  // by each asker
};

}  // namespace

Layout layout_of(int64_t tokens, std::vector<Places> const& queries, std::vector<Seen> const& keys, Tiles most) {
    Layout layout;
    layout.tokens = tokens;
    for (Places const& each : queries) {
        layout.queries_at_once = std::max(layout.queries_at_once, parts_of(each.count, kRows) * kRows);
    }
    layout.queries_at_once = std::min(layout.queries_at_once, most.queries);
    for (Places const& each : queries) {
        layout.askers.push_back({each, layout.tiles, 0});
        layout.tiles += parts_of(each.count, layout.queries_at_once);
    }
    Filling filling(layout, most.keys);
    for (Seen const& seen : keys) {
        int64_t const count = seen.keys.count, each = even_part(count, most.keys, 8);
        for (int64_t first = 0; first < count; first += each) {
            filling.add(seen.keys.part(first, std::min(each, count - first)), seen.by);
        }
        for (int32_t number : seen.by) layout.scores += count * queries[size_t(number)].count;
    }
    filling.close();
    return layout;
}

}  // namespace hunyuan_fast::rope3d_attention
