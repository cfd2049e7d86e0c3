#include "sliding_tile_attention/cpu.h"

#include <algorithm>
#include <limits>
#include <map>
#include <utility>

#include "common/cpu_isa.h"
#include "rope3d_attention/cpu_work.h"

namespace hunyuan_fast::sliding_tile_attention {
namespace {

CpuKernels const& kernels(DType dtype) {
    switch (cpu_isa()) {
#ifdef HUNYUAN_FAST_X86
        case CpuIsa::avx512:
#ifdef HUNYUAN_FAST_X86_BF16
            if (dtype == DType::bf16 && cpu_multiplies_bf16()) return avx512_bf16_kernels();
#endif
            return avx512_kernels(dtype);
        case CpuIsa::avx2: return avx2_kernels(dtype);
#endif
        default: return plain_kernels(dtype);
    }
}

// Groups by window and length: heads and samples that have both in common share them.
using Groups = std::map<std::pair<Sizes3, int64_t>, std::vector<Group>>;

std::vector<Block> blocks_of(ForwardParams const& p, Groups const& groups, std::vector<Sizes3> const& windows,
                             Tiles most, int num_threads) {
    std::vector<Block> blocks;
    int64_t const heads = p.sizes.B * p.sizes.N;
    for (int64_t b = 0; b < p.sizes.B; ++b) {
        for (int64_t n = 0; n < p.sizes.N; ++n) {
            auto const& of_head = groups.at({windows[size_t(n)], p.lengths[b]});
            // Where there are many groups, or heads, there is work enough for all threads.
            int64_t const threads = of_head.size() > 2 ? 1 : std::max(num_threads, 1);
            for (Group const& group : of_head) {
                int64_t const queries = int64_t(group.queries.size()), keys = int64_t(group.keys.size());
                if (queries == 0) continue;
                int64_t const each = rope3d_attention::queries_per_block(queries, most.queries, heads, threads);
                int64_t const at_once = rope3d_attention::even_part(keys, most.keys, 32);
                for (int64_t first = 0; first < queries; first += each) {
                    blocks.push_back({b, n, group.queries.data() + first, std::min(each, queries - first),
                                      group.keys.data(), keys, at_once});
                }
            }
        }
    }
    // what takes longest comes first
    std::stable_sort(blocks.begin(), blocks.end(),
                     [](Block const& x, Block const& y) { return x.count * x.num_keys > y.count * y.num_keys; });
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

}  // namespace

void forward_cpu(DType dtype, ForwardParams const& p, Sizes3 const& grid, Sizes3 const& tile,
                 std::vector<Sizes3> const& windows, int num_threads) {
    auto const& kernel = kernels(dtype);
    Groups groups;
    for (int64_t b = 0; b < p.sizes.B; ++b) {
        for (Sizes3 const& window : windows) {
            auto const [place, is_new] = groups.try_emplace({window, p.lengths[b]});
            if (is_new) place->second = groups_of(grid, tile, window, p.lengths[b]);
        }
    }
    auto const blocks = blocks_of(p, groups, windows, kernel.tiles(p.sizes.D), num_threads);
    int64_t floats = 0;
    for (Block const& block : blocks) {
        floats = std::max(floats, kernel.room(p.sizes.D, block.count, block.keys_at_once));
    }
    int64_t const count = int64_t(blocks.size());
    // after the blocks the padding of each sample
    rope3d_attention::run_with_room(count + p.sizes.B, floats, num_threads, [&](int64_t i, float* room) {
        if (i < count) return kernel.forward(p, blocks[size_t(i)], room);
        clear_padding(p, i - count, element_size(dtype));
    });
}

}  // namespace hunyuan_fast::sliding_tile_attention
