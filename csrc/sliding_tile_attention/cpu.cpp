#include "sliding_tile_attention/cpu.h"

#include <algorithm>
#include <limits>
#include <map>
#include <utility>

#include "rope3d_attention/cpu_lanes.h"
#include "rope3d_attention/cpu_work.h"

namespace hunyuan_fast::sliding_tile_attention {
namespace {

using rope3d_attention::BackwardPlan;
using rope3d_attention::Block;
using rope3d_attention::CpuKernels;
using rope3d_attention::Head;
using rope3d_attention::Layout;
using rope3d_attention::Places;
using rope3d_attention::Tiles;

Places places_of(std::vector<int64_t> const& rows) { return {0, int64_t(rows.size()), rows.data()}; }

// By window and length: heads and samples that have both in common share what is made of them.
template <class Made>
using Shared = std::map<std::pair<Sizes3, int64_t>, Made>;

template <class Made, class Make>
Shared<Made> share(Inputs const& p, std::vector<Sizes3> const& windows, Make const& make) {
    Shared<Made> shared;
    for (int64_t b = 0; b < p.sizes.B; ++b) {
        for (Sizes3 const& window : windows) {
            auto const [place, is_new] = shared.try_emplace({window, p.lengths[b]});
            if (is_new) place->second = make(window, p.lengths[b]);
        }
    }
    return shared;
}

std::vector<Block> blocks_of(ForwardParams const& p, Shared<std::vector<Group>> const& groups,
                             std::vector<Sizes3> const& windows, Tiles most, int num_threads) {
    std::vector<Block> blocks;
    int64_t const heads = p.sizes.B * p.sizes.N;
    for (int64_t b = 0; b < p.sizes.B; ++b) {
        for (int64_t n = 0; n < p.sizes.N; ++n) {
            auto const& of_head = groups.at({windows[size_t(n)], p.lengths[b]});
            // Where there are many groups, or heads, there is work enough for all threads.
            int64_t const threads = of_head.size() > 2 ? 1 : std::max(num_threads, 1);
            for (Group const& group : of_head) {
                Places const queries = places_of(group.queries), keys = places_of(group.keys);
                if (queries.count == 0) continue;
                int64_t const each = rope3d_attention::queries_per_block(queries.count, most.queries, heads, threads);
                int64_t const at_once = rope3d_attention::even_part(keys.count, most.keys, 32);
                for (int64_t first = 0; first < queries.count; first += each) {
                    blocks.push_back({b, n, queries.part(first, std::min(each, queries.count - first)), keys, at_once});
                }
            }
        }
    }
    // what takes longest comes first
    std::stable_sort(blocks.begin(), blocks.end(), [](Block const& x, Block const& y) {
        return x.queries.count * x.keys.count > y.queries.count * y.keys.count;
    });
    return blocks;
}

void clear_padding(ForwardParams const& p, int64_t b, int64_t element) {
    int64_t const length = p.lengths[b];
    rope3d_attention::clear_rows(p.out, p.sizes, b, length, element);
    for (int64_t n = 0; n < p.sizes.N; ++n) {
        float* const lse = p.lse + (b * p.sizes.N + n) * p.sizes.L;
        std::fill(lse + length, lse + p.sizes.L, -std::numeric_limits<float>::infinity());
    }
}

// Backward of all heads: who sees whom, and in what order. Layouts point into the patterns.
class BackwardHeads {
public:
    BackwardHeads(Inputs const& p, Sizes3 const& grid, Sizes3 const& tile, std::vector<Sizes3> const& windows, Tiles most)
        : patterns_(share<Transposed>(p, windows, [&](Sizes3 const& window, int64_t length) {
              return transposed(grid, tile, window, length);
          })) {
        for (auto const& [key, pattern] : patterns_) layouts_[key] = made_of(pattern, key.second, most);
        for (int64_t b = 0; b < p.sizes.B; ++b) {
            for (int64_t n = 0; n < p.sizes.N; ++n) {
                Layout const& layout = layouts_.at({windows[size_t(n)], p.lengths[b]});
                if (p.lengths[b] > 0) heads_.push_back({b, n, &layout});
            }
        }
        // what takes longest comes first, those of a layout together: they need not wait for each other's whole
        std::stable_sort(heads_.begin(), heads_.end(), [](Head const& x, Head const& y) {
            return x.layout->scores != y.layout->scores ? x.layout->scores > y.layout->scores : x.layout < y.layout;
        });
    }

    std::vector<Head> const& in_order() const { return heads_; }

private:
    static Layout made_of(Transposed const& pattern, int64_t length, Tiles most) {
        std::vector<Places> queries;
        for (auto const& each : pattern.queries) queries.push_back(places_of(each));
        std::vector<rope3d_attention::Seen> seen;
        for (SeenKeys const& each : pattern.seen) seen.push_back({places_of(each.keys), each.by});
        return rope3d_attention::layout_of(length, queries, seen, most);
    }

    Shared<Transposed> const patterns_;
    Shared<Layout> layouts_;
    std::vector<Head> heads_;
};

}  // namespace

void forward_cpu(DType dtype, ForwardParams const& p, Sizes3 const& grid, Sizes3 const& tile,
                 std::vector<Sizes3> const& windows, int num_threads) {
    auto const& kernel = rope3d_attention::cpu_kernels(dtype);
    auto const groups = share<std::vector<Group>>(p, windows, [&](Sizes3 const& window, int64_t length) {
        return groups_of(grid, tile, window, length);
    });
    auto const blocks = blocks_of(p, groups, windows, kernel.forward_tiles(p.sizes.D), num_threads);
    int64_t floats = 0;
    for (Block const& block : blocks) {
        floats = std::max(floats, kernel.forward_room(p.sizes.D, block.queries.count, block.keys_at_once));
    }
    int64_t const count = int64_t(blocks.size());
    // after the blocks the padding of each sample
    rope3d_attention::run_with_room(count + p.sizes.B, floats, num_threads, [&](int64_t i, float* room) {
        if (i < count) return kernel.forward(p, blocks[size_t(i)], room);
        clear_padding(p, i - count, element_size(dtype));
    });
}

void backward_cpu(DType dtype, BackwardParams const& p, Sizes3 const& grid, Sizes3 const& tile,
                  std::vector<Sizes3> const& windows, int num_threads) {
    auto const& kernel = rope3d_attention::cpu_kernels(dtype);
    for (int64_t b = 0; b < p.sizes.B; ++b) {
        for (auto const* x : {&p.dq, &p.dk, &p.dv}) {
            rope3d_attention::clear_rows(*x, p.sizes, b, p.lengths[b], element_size(dtype));
        }
    }
    BackwardHeads const heads(p, grid, tile, windows, kernel.backward_tiles(p.sizes.D));
    BackwardPlan const plan(heads.in_order(), kernel, p.sizes.D, num_threads);
    run_backward(p, plan, kernel, num_threads);
}

int64_t backward_bytes(DType dtype, Inputs const& p, Sizes3 const& grid, Sizes3 const& tile,
                       std::vector<Sizes3> const& windows, int num_threads) {
    auto const& kernel = rope3d_attention::cpu_kernels(dtype);
    BackwardHeads const heads(p, grid, tile, windows, kernel.backward_tiles(p.sizes.D));
    return BackwardPlan(heads.in_order(), kernel, p.sizes.D, num_threads).bytes();
}

}  // namespace hunyuan_fast::sliding_tile_attention
