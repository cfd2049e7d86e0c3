// The stages of the Hopper convolution as they change hands: barriers, arrivals and waits as in sm90_forward.cuh.
#include <cstdint>
#include <random>
#include <vector>

#include "causal_conv3d/sm90_layout.h"

namespace {

using namespace hunyuan_fast;
using namespace hunyuan_fast::causal_conv3d;

constexpr int kWeights = 100;  // bytes, for a bulk copy

// PTX ISA, "mbarrier": a phase is over when all arrivals that it expects and all announced bytes have come.
struct Barrier {
    int expected = 0, pending = 0;
    int64_t bytes = 0;
    uint32_t phase = 0;

    void init(int arrivals) { expected = pending = arrivals; }
    void arrive() { --pending, settle(); }
    void announce(int64_t more) { bytes += more; }
    void come(int64_t more) { bytes -= more, settle(); }
    bool over(uint32_t parity) const { return phase != parity; }

private:
    void settle() {
        if (pending == 0 && bytes == 0) phase ^= 1, pending = expected;
    }
};

// What is under way to a stage: an arrival after copies, or bytes of weights.
struct Landing {
    int stage;
    int64_t bytes;
};

struct Agent {
    sm90::Ring<kStages> ring;
    int done = 0;
    int reading = -1;  // the stage of products that may be unfinished
};

struct Block {
    int const total, steps;
    Barrier full[kStages], empty[kStages];
    int holds[kStages];
    std::vector<Landing> landing;
    Agent producer, consumers[kConsumers];

    Block(int tiles, int steps) : total(tiles * steps), steps(steps) {
        for (int stage = 0; stage < kStages; ++stage) {
            full[stage].init(sm90::kWarpgroup + 1);
            empty[stage].init(kConsumers * 4);
            holds[stage] = -1;
        }
    }

    bool over() const { return consumers[0].done == total && consumers[1].done == total; }

    char const* produce() {
        int const stage = producer.ring.stage;
        if (producer.done == total || !empty[stage].over(producer.ring.phase ^ 1)) return nullptr;
        for (auto const& each : consumers) {
            if (each.reading == stage) return "a stage is written while products read it";
        }
        full[stage].announce(kWeights), full[stage].arrive();
        landing.push_back({stage, kWeights});
        for (int thread = 0; thread < sm90::kWarpgroup; ++thread) landing.push_back({stage, 0});
        holds[stage] = producer.done++;
        producer.ring.advance();
        return nullptr;
    }

    void land(size_t which) {
        Landing const landed = landing[which];
        landing[which] = landing.back(), landing.pop_back();
        if (landed.bytes > 0) {
            full[landed.stage].come(landed.bytes);
        } else {
            full[landed.stage].arrive();
        }
    }

    // The products of a step are over before its stage is given back, one step later or at the end of the tile.
    char const* consume(Agent& consumer) {
        int const stage = consumer.ring.stage;
        if (consumer.done == total || !full[stage].over(consumer.ring.phase)) return nullptr;
        if (holds[stage] != consumer.done) return "a stage holds another step than is read";
        for (auto const& each : landing) {
            if (each.stage == stage) return "a stage is read before all of it has come";
        }
        give_back(consumer);
        consumer.reading = stage, ++consumer.done;
        consumer.ring.advance();
        if (consumer.done % steps == 0) give_back(consumer);
        return nullptr;
    }

    void give_back(Agent& consumer) {
        if (consumer.reading < 0) return;
        for (int warp = 0; warp < 4; ++warp) empty[consumer.reading].arrive();
        consumer.reading = -1;
    }
};

}  // namespace

// Some tiles, events in a random order. Null, or what went wrong.
extern "C" char const* ring(int tiles, int steps, int seed) {
    Block block(tiles, steps);
    std::mt19937 random{static_cast<unsigned>(seed)};
    for (int64_t event = 0; event < int64_t(block.total) * 4000; ++event) {
        if (block.over()) return nullptr;
        auto const choice = random() % 8;
        char const* wrong = nullptr;
        if (choice == 0) wrong = block.produce();
        if (choice == 1 || choice == 2) wrong = block.consume(block.consumers[choice - 1]);
        if (wrong != nullptr) return wrong;
        if (choice > 2 && !block.landing.empty()) block.land(random() % block.landing.size());
    }
    return "they wait for ever";
}
