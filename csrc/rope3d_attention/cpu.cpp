#include "rope3d_attention/cpu.h"

#include <sched.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <vector>

#include "common/cpu_isa.h"
#include "common/parallel.h"
#include "rope3d_attention/cpu_work.h"

namespace hunyuan_fast::rope3d_attention {
namespace {

// Lanes of backward: two for each thread where they fit into so much, which leaves a choice; and no more than fit into
// so much, unless threads that follow each other through a lane, so many tiles apart, need more.
constexpr int64_t kFewBytes = 1024 * 1024;
constexpr int64_t kMostBytes = 8 * 1024 * 1024;
constexpr int64_t kTilesApart = 8;

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
                blocks.push_back({b, n, first, std::min(queries, length - first), keys});
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
            room = std::max(room, kernel.forward_room(p.sizes.D, block.count, block.keys_at_once));
        }
        threads = std::min<int64_t>(int64_t(blocks.size()) + p.sizes.B, std::max(num_threads, 1));
    }
};

// A head in backward: how many of its keys and queries at once.
struct Head {
    int64_t b, n;
    int64_t keys, chunks, queries, tiles;
};

// All heads, the longest first. Tiles are of one size where a head has several: they are passed on to other heads.
std::vector<Head> heads_of(Inputs const& p, CpuKernels const& kernel) {
    Tiles const most = kernel.backward_tiles(p.sizes.D);
    std::vector<Head> heads;
    for (int64_t b : longest_first(p)) {
        int64_t const length = p.lengths[b], own = p.queries[b];
        if (length == 0) break;
        int64_t const keys = even_part(length, most.keys, 8);
        int64_t const queries = std::min(most.queries, parts_of(own, kRows) * kRows);
        for (int64_t n = 0; n < p.sizes.N; ++n) {
            heads.push_back({b, n, keys, parts_of(length, keys), queries, parts_of(own, queries)});
        }
    }
    return heads;
}

// How many lanes of so many bytes: one for each thread, where they are short two, where they are long fewer.
int64_t lanes_for(int64_t heads, int64_t tiles, int64_t bytes, int64_t threads) {
    int64_t const needed = parts_of(threads, std::max<int64_t>(1, tiles / kTilesApart));
    int64_t const fitting = std::min(threads, std::max(needed, kMostBytes / bytes));
    return std::min({heads, 2 * threads, std::max(fitting, kFewBytes / bytes)});
}

struct BackwardPlan {
    std::vector<Head> heads;
    int64_t chunks = 0;
    int64_t room = 0;  // floats for each thread
    int64_t threads = 0;
    int64_t lane = 0;  // floats for each lane
    int64_t lanes = 0;

    BackwardPlan(Inputs const& p, CpuKernels const& kernel, int num_threads) : heads(heads_of(p, kernel)) {
        int64_t tiles = 0;
        for (Head const& head : heads) {
            chunks += head.chunks;
            tiles = std::max(tiles, head.tiles);
            room = std::max(room, kernel.backward_room(p.sizes.D, head.queries, head.keys));
            lane = std::max(lane, head.tiles * kernel.shared_floats(p.sizes.D, head.queries));
        }
        if (heads.empty()) return;
        threads = std::min<int64_t>(chunks, std::max(num_threads, 1));
        lanes = lanes_for(int64_t(heads.size()), tiles, lane * int64_t(sizeof(float)), threads);
    }
};

// Heads go through lanes, one chunk after the other. A lane has the memory that chunks share: heads follow each other
// in it. Whoever asks gets a chunk of a lane where fewest are at work.
class Lanes {
public:
    Lanes(BackwardParams const& p, BackwardPlan const& plan)
        : p_(p), plan_(plan), memory_(plan.lanes * plan.lane), lanes_(size_t(plan.lanes)), left_(size_t(plan.chunks)) {}

    // Calls body(chunk) as long as there are any.
    template <class Body>
    void work(Body const& body) {
        std::unique_lock<std::mutex> lock(mutex_);
        while (Lane* const lane = next_lane()) {
            Chunk const chunk = next_chunk(*lane);
            ++lane->at_work;
            lock.unlock();
            body(chunk);
            lock.lock();
            --lane->at_work;
        }
    }

private:
    struct Lane {
        Head const* head = nullptr;  // null: the next one
        int64_t index = 0;
        int64_t at_work = 0;
        int32_t* before = nullptr;
    };

    Lane* next_lane() {
        Lane* best = nullptr;
        for (Lane& lane : lanes_) {
            if (chunks_in(lane) == 0) continue;
            if (!best || lane.at_work < best->at_work ||
                (lane.at_work == best->at_work && chunks_in(lane) > chunks_in(*best))) {
                best = &lane;
            }
        }
        return best;
    }

    // Those of its head that nobody has begun.
    int64_t chunks_in(Lane const& lane) const {
        if (lane.head) return lane.head->chunks - lane.index;
        return begun_heads_ < plan_.heads.size() ? plan_.heads[begun_heads_].chunks : 0;
    }

    Chunk next_chunk(Lane& lane) {
        if (!lane.head) lane.head = &plan_.heads[begun_heads_++], lane.index = 0;
        Head const& head = *lane.head;
        Chunk chunk;
        chunk.b = head.b;
        chunk.n = head.n;
        chunk.first = lane.index * head.keys;
        chunk.count = std::min(head.keys, p_.lengths[head.b] - chunk.first);
        chunk.queries_at_once = head.queries;
        chunk.is_first = lane.index == 0;
        chunk.is_last = ++lane.index == head.chunks;
        chunk.shared = memory_.begin() + (&lane - lanes_.data()) * plan_.lane;
        chunk.before = lane.before;
        chunk.left = lane.before = &left_[begun_chunks_++];
        if (chunk.is_last) lane.head = nullptr;
        return chunk;
    }

    BackwardParams const& p_;
    BackwardPlan const& plan_;
    Floats const memory_;
    std::vector<Lane> lanes_;
    std::vector<int32_t> left_;  // of each chunk: tiles that it has left
    std::mutex mutex_;
    size_t begun_heads_ = 0, begun_chunks_ = 0;
};

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
    // Reads before another thread may have the processor: some 50 us, about what a tile takes. Who else runs may keep
    // it for milliseconds.
    constexpr int kPatience = 4096;
    for (int reads = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < value; ++reads) {
        if (reads > kPatience) sched_yield();
#ifdef HUNYUAN_FAST_X86
        __builtin_ia32_pause();
#endif
    }
}

void forward_cpu(DType dtype, ForwardParams const& p, int num_threads) {
    auto const& kernel = kernels(dtype);
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
    auto const& kernel = kernels(dtype);
    clear_padding(p, element_size(dtype), num_threads);
    BackwardPlan const plan(p, kernel, num_threads);
    Lanes lanes(p, plan);
    run_with_rooms(plan.threads, plan.room, num_threads, [&](float* room) {
        lanes.work([&](Chunk const& chunk) { kernel.backward(p, chunk, room); });
    });
}

int64_t forward_bytes(DType dtype, Inputs const& p, int num_threads) {
    ForwardPlan const plan(p, kernels(dtype), num_threads);
    return plan.threads * aligned(plan.room) * int64_t(sizeof(float));
}

int64_t backward_bytes(DType dtype, Inputs const& p, int num_threads) {
    BackwardPlan const plan(p, kernels(dtype), num_threads);
    return (plan.threads * aligned(plan.room) + plan.lanes * plan.lane) * int64_t(sizeof(float));
}

}  // namespace hunyuan_fast::rope3d_attention
