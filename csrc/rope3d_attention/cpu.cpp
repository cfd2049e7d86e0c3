#include "rope3d_attention/cpu.h"

#include <sched.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "rope3d_attention/cpu_work.h"

namespace hunyuan_fast::rope3d_attention {
namespace {

// Most of the memory for dq of the heads under way, unless a head for each thread needs more.
constexpr int64_t kMostBytes = 8 * 1024 * 1024;

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

// Samples by falling number of scores: what takes longest comes first, and what takes no time last.
std::vector<int64_t> longest_first(Inputs const& p) {
    std::vector<int64_t> samples(size_t(p.sizes.B));
    for (size_t b = 0; b < samples.size(); ++b) samples[b] = int64_t(b);
    std::stable_sort(samples.begin(), samples.end(),
                     [&](int64_t a, int64_t b) { return p.lengths[a] * p.queries[a] > p.lengths[b] * p.queries[b]; });
    return samples;
}

std::vector<Block> blocks_of(ForwardParams const& p, CpuKernels const& kernel, int num_threads) {
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
                blocks.push_back({b, n, first, std::min(queries, length - first), keys});
            }
        }
    }
    return blocks;
}

// Keys and queries at once of a sample, and what its heads need.
struct Plan {
    int64_t keys, chunks, queries, tiles;
    int64_t dq_floats;  // of one head
};

Plan plan_of(int64_t keys, int64_t queries, int64_t D, CpuKernels const& kernel) {
    Tiles const most = kernel.backward_tiles(D);
    Plan plan;
    plan.keys = even_part(keys, most.keys, 8);
    plan.chunks = parts_of(keys, plan.keys);
    plan.queries = even_part(queries, most.queries, kRows);
    plan.tiles = parts_of(queries, plan.queries);
    plan.dq_floats = plan.chunks > 1 ? plan.tiles * plan.queries * kernel.padded(D) : 0;
    return plan;
}

struct Head {
    int64_t b, n;
    Plan plan;
};

// The chunks of some heads, the first ones of all heads first: seldom are two of one head at work at the same time.
std::vector<Chunk> chunks_of(BackwardParams const& p, std::vector<Head> const& heads, float* dq, int32_t* done) {
    int64_t most = 0;
    for (Head const& head : heads) most = std::max(most, head.plan.chunks);
    std::vector<Chunk> chunks;
    for (int64_t index = 0; index < most; ++index) {
        float* dq_of_head = dq;
        int32_t* done_of_head = done;
        for (Head const& head : heads) {
            Plan const& plan = head.plan;
            if (index < plan.chunks) {
                int64_t const first = index * plan.keys, count = std::min(plan.keys, p.lengths[head.b] - first);
                bool const is_last = index + 1 == plan.chunks;
                chunks.push_back({head.b, head.n, first, count, plan.queries, int32_t(index), is_last,
                                  plan.dq_floats ? dq_of_head : nullptr, done_of_head});
            }
            dq_of_head += plan.dq_floats;
            done_of_head += plan.tiles;
        }
    }
    return chunks;
}

void run_heads(BackwardParams const& p, CpuKernels const& kernel, std::vector<Head> const& heads, int num_threads) {
    int64_t floats = 0, tiles = 0, room = 0;
    for (Head const& head : heads) {
        floats += head.plan.dq_floats;
        tiles += head.plan.tiles;
        room = std::max(room, kernel.backward_room(p.sizes.D, head.plan.queries, head.plan.keys));
    }
    Floats const dq(floats);
    std::vector<int32_t> done(size_t(tiles), 0);
    auto const chunks = chunks_of(p, heads, dq.begin(), done.data());
    run_with_room(int64_t(chunks.size()), room, num_threads,
                  [&](int64_t i, float* memory) { kernel.backward(p, chunks[size_t(i)], memory); });
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

void wait_for(int32_t const* counter, int32_t value) {
    constexpr int kPatience = 64;  // reads before another thread may have the processor
    for (int reads = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) != value; ++reads) {
        if (reads > kPatience) sched_yield();
    }
}

void forward_cpu(DType dtype, ForwardParams const& p, int num_threads) {
    auto const& kernel = kernels(dtype);
    auto const blocks = blocks_of(p, kernel, num_threads);
    int64_t floats = 0;
    for (Block const& block : blocks) {
        floats = std::max(floats, kernel.forward_room(p.sizes.D, block.count, block.keys_at_once));
    }
    int64_t const count = int64_t(blocks.size());
    // after the blocks the padding of each sample
    run_with_room(count + p.sizes.B, floats, num_threads, [&](int64_t i, float* room) {
        if (i < count) return kernel.forward(p, blocks[size_t(i)], room);
        int64_t const b = i - count, length = p.queries[b];
        clear_rows(p.out, p.sizes, b, length, element_size(dtype));
        for (int64_t n = 0; n < p.sizes.N; ++n) {
            float* const lse = p.lse + (b * p.sizes.N + n) * p.sizes.L;
            std::fill(lse + length, lse + p.sizes.L, -std::numeric_limits<float>::infinity());
        }
    });
}

void backward_cpu(DType dtype, BackwardParams const& p, int num_threads) {
    auto const& kernel = kernels(dtype);
    clear_padding(p, element_size(dtype), num_threads);
    std::vector<Head> heads;
    int64_t bytes = 0;
    for (int64_t b : longest_first(p)) {
        if (p.lengths[b] == 0) break;
        Plan const plan = plan_of(p.lengths[b], p.queries[b], p.sizes.D, kernel);
        int64_t const more = plan.dq_floats * int64_t(sizeof(float));
        for (int64_t n = 0; n < p.sizes.N; ++n) {
            if (bytes + more > kMostBytes && int64_t(heads.size()) >= num_threads) {
                run_heads(p, kernel, heads, num_threads);
                heads.clear();
                bytes = 0;
            }
            heads.push_back({b, n, plan});
            bytes += more;
        }
    }
    run_heads(p, kernel, heads, num_threads);
}

}  // namespace hunyuan_fast::rope3d_attention
