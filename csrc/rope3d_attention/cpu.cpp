#include "rope3d_attention/cpu.h"

#include <algorithm>
#include <deque>
#include <limits>
#include <vector>

#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "rope3d_attention/cpu_lanes.h"
#include "rope3d_attention/cpu_work.h"

namespace hunyuan_fast::rope3d_attention {
namespace {

// Samples by falling number of scores: what takes longest comes first, and what takes no time last.
std::vector<int64_t> longest_first(Inputs const& p) {
    std::vector<int64_t> samples(size_t(p.sizes.B));
    for (size_t b = 0; b < samples.size(); ++b) samples[b] = int64_t(b);
    std::stable_sort(samples.begin(), samples.end(),
                     [&](int64_t a, int64_t b) { return p.lengths[a] * p.queries[a] > p.lengths[b] * p.queries[b]; });
    return samples;
}

std::vector<Block> blocks_of(Inputs const& p, CpuKernels const& kernel, int num_threads) {
    std::vector<Block> blocks;
    Tiles const most = kernel.forward_tiles(p.sizes.D);
    int64_t const heads = p.sizes.B * p.sizes.N;
    for (int64_t b : longest_first(p)) {
        int64_t const length = p.queries[b];
        if (length == 0) break;
        int64_t const queries = queries_per_block(length, most.queries, heads, std::max(num_threads, 1));
        int64_t const keys = even_part(p.lengths[b], most.keys, 32);
        for (int64_t n = 0; n < p.sizes.N; ++n) {
            for (int64_t first = 0; first < length; first += queries) {
                Places const own{first, std::min(queries, length - first)};
                blocks.push_back({b, n, own, {0, p.lengths[b]}, keys});
            }
        }
    }
    return blocks;
}

struct ForwardPlan {
    std::vector<Block> blocks;
    int64_t room = 0;     // floats for each thread
    int64_t threads = 0;  // of blocks, and of the padding of each sample

    ForwardPlan(Inputs const& p, CpuKernels const& kernel, int num_threads)
        : blocks(blocks_of(p, kernel, num_threads)) {
        for (Block const& block : blocks) {
            room = std::max(room, kernel.forward_room(p.sizes.D, block.queries.count, block.keys_at_once));
        }
        threads = std::min<int64_t>(int64_t(blocks.size()) + p.sizes.B, std::max(num_threads, 1));
    }
};

// All heads, the longest first; samples of the same lengths share a layout.
std::vector<Head> heads_of(Inputs const& p, CpuKernels const& kernel, std::deque<Layout>& layouts) {
    Tiles const most = kernel.backward_tiles(p.sizes.D);
    std::vector<Head> heads;
    int64_t length = 0, own = 0;
    for (int64_t b : longest_first(p)) {
        if (p.lengths[b] == 0) break;
        if (p.lengths[b] != length || p.queries[b] != own) {
            length = p.lengths[b], own = p.queries[b];
            layouts.push_back(layout_of(own, {{0, own}}, {{{0, length}, {0}}}, most));
        }
        for (int64_t n = 0; n < p.sizes.N; ++n) heads.push_back({b, n, &layouts.back()});
    }
    return heads;
}

void clear_padding(BackwardParams const& p, int64_t element, int num_threads) {
    auto const all = [&](int64_t const* lengths, int64_t whole) {
        return std::all_of(lengths, lengths + p.sizes.B, [&](int64_t length) { return length == whole; });
    };
    if (all(p.lengths, p.keys) && all(p.queries, p.sizes.L)) return;
    parallel_for(p.sizes.B, 1, num_threads, [&](int64_t b, int64_t) {
        clear_rows(p.dq, p.sizes, b, p.queries[b], element);
        for (Heads const* x : {&p.dk, &p.dv}) clear_rows(*x, p.key_sizes(), b, p.lengths[b], element);
    });
}

}  // namespace

CpuKernels const& cpu_kernels(DType dtype) {
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

void forward_cpu(DType dtype, ForwardParams const& p, int num_threads) {
    auto const& kernel = cpu_kernels(dtype);
    ForwardPlan const plan(p, kernel, num_threads);
    int64_t const count = int64_t(plan.blocks.size());
    // after the blocks the padding of each sample
    run_with_room(count + p.sizes.B, plan.room, num_threads, [&](int64_t i, float* room) {
        if (i < count) return kernel.forward(p, plan.blocks[size_t(i)], room);
        int64_t const b = i - count, length = p.queries[b];
        clear_rows(p.out, p.sizes, b, length, element_size(dtype));
        for (int64_t n = 0; n < p.sizes.N; ++n) {
            float* const lse = p.lse + (b * p.sizes.N + n) * p.sizes.L;
            std::fill(lse + length, lse + p.sizes.L, -std::numeric_limits<float>::infinity());
        }
    });
}

void backward_cpu(DType dtype, BackwardParams const& p, int num_threads) {
    auto const& kernel = cpu_kernels(dtype);
    clear_padding(p, element_size(dtype), num_threads);
    std::deque<Layout> layouts;
    BackwardPlan const plan(heads_of(p, kernel, layouts), kernel, p.sizes.D, num_threads);
    run_backward(p, plan, kernel, num_threads);
}

int64_t forward_bytes(DType dtype, Inputs const& p, int num_threads) {
    ForwardPlan const plan(p, cpu_kernels(dtype), num_threads);
    return plan.threads * aligned(plan.room) * int64_t(sizeof(float));
}

int64_t backward_bytes(DType dtype, Inputs const& p, int num_threads) {
    auto const& kernel = cpu_kernels(dtype);
    std::deque<Layout> layouts;
    return BackwardPlan(heads_of(p, kernel, layouts), kernel, p.sizes.D, num_threads).bytes();
}

}  // namespace hunyuan_fast::rope3d_attention
