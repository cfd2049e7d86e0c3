#include "rope3d_attention/cpu_lanes.h"

#include <sched.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "rope3d_attention/cpu_work.h"

namespace hunyuan_fast::rope3d_attention {
namespace {

// Lanes: two for each thread where they fit into so much, which leaves a choice; and no more than fit into so much,
// unless threads that follow each other through a lane, so many tiles apart, need more.
constexpr int64_t kFewBytes = 1024 * 1024;
constexpr int64_t kMostBytes = 8 * 1024 * 1024;
constexpr int64_t kTilesApart = 8;

// How many lanes of so many bytes: one for each thread, where they are short two, where they are long fewer.
int64_t lanes_for(int64_t heads, int64_t tiles, int64_t bytes, int64_t threads) {
    int64_t const needed = parts_of(threads, std::max<int64_t>(1, tiles / kTilesApart));
    int64_t const fitting = std::min(threads, std::max(needed, kMostBytes / bytes));
    return std::min({heads, 2 * threads, std::max(fitting, kFewBytes / bytes)});
}

// Heads go through lanes, one chunk after the other. A lane has the memory that chunks share: heads follow each other
// in it. Whoever asks gets a chunk of a lane where fewest are at work.
class Lanes {
public:
    Lanes(BackwardPlan const& plan)
        : plan_(plan), memory_(plan.lanes * plan.lane), lanes_(size_t(plan.lanes)), left_(size_t(plan.tiles)) {}

    // Calls body(chunk) as long as there are any.
    template <class Body>
    void work(Body const& body) {
        std::unique_lock<std::mutex> lock(mutex_);
        while (Lane* const lane = next_lane()) {
            Chunk const chunk = next_chunk(*lane);
            Head const* const before = lane->before;
            ++lane->at_work;
            lock.unlock();
            // tiles of another layout lie elsewhere
            if (before && !chunk.before) wait_for_all(*before);
            body(chunk);
            lock.lock();
            --lane->at_work;
        }
    }

private:
    struct Lane {
        Head const* head = nullptr;  // null: the next one
        Head const* before = nullptr;
        size_t index = 0;  // of the next chunk
        int64_t at_work = 0;
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
    size_t chunks_in(Lane const& lane) const {
        if (lane.head && lane.index < lane.head->layout->parts.size()) {
            return lane.head->layout->parts.size() - lane.index;
        }
        return begun_ < plan_.heads.size() ? plan_.heads[begun_].layout->parts.size() : 0;
    }

    Chunk next_chunk(Lane& lane) {
        if (!lane.head || lane.index == lane.head->layout->parts.size()) {
            lane.before = lane.head;
            lane.head = &plan_.heads[begun_++];
            lane.index = 0;
        }
        Head const& head = *lane.head;
        Chunk chunk;
        chunk.b = head.b;
        chunk.n = head.n;
        chunk.layout = head.layout;
        chunk.part = &head.layout->parts[lane.index++];
        chunk.shared = memory_.begin() + (&lane - lanes_.data()) * plan_.lane;
        chunk.left = left_.data() + head.first_tile;
        if (lane.before && lane.before->layout == head.layout) chunk.before = left_.data() + lane.before->first_tile;
        return chunk;
    }

    void wait_for_all(Head const& head) const {
        int32_t const* left = left_.data() + head.first_tile;
        for (Askers const& each : head.layout->askers) {
            int64_t const tiles = parts_of(each.queries.count, head.layout->queries_at_once);
            for (int64_t i = 0; i < tiles; ++i) wait_for(left++, each.chunks);
        }
    }

    BackwardPlan const& plan_;
    Floats const memory_;
    std::vector<Lane> lanes_;
    std::vector<int32_t> left_;  // of each tile of each head: how many chunks have left it
    std::mutex mutex_;
    size_t begun_ = 0;
};

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

BackwardPlan::BackwardPlan(std::vector<Head> given, CpuKernels const& kernel, int64_t D, int num_threads)
    : heads(std::move(given)) {
    int64_t longest = 0;
    for (Head& head : heads) {
        Layout const& layout = *head.layout;
        head.first_tile = tiles;
        tiles += layout.tiles;
        longest = std::max(longest, layout.tiles);
        chunks += int64_t(layout.parts.size());
        room = std::max(room, kernel.backward_room(D, layout.queries_at_once, layout.keys_at_once));
        lane = std::max(lane, kernel.shared_floats(D, layout.tokens));
    }
    if (heads.empty()) return;
    threads = std::min<int64_t>(chunks, std::max(num_threads, 1));
    lanes = lanes_for(int64_t(heads.size()), longest, lane * int64_t(sizeof(float)), threads);
}

int64_t BackwardPlan::bytes() const { return (threads * aligned(room) + lanes * lane) * int64_t(sizeof(float)); }

void run_backward(BackwardParams const& p, BackwardPlan const& plan, CpuKernels const& kernel, int num_threads) {
    Lanes lanes(plan);
    run_with_rooms(plan.threads, plan.room, num_threads, [&](float* room) {
        lanes.work([&](Chunk const& chunk) { kernel.backward(p, chunk, room); });
    });
}

}  // namespace hunyuan_fast::rope3d_attention
