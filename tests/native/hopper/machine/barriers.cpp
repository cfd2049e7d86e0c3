// What threads wait at: PTX ISA, "Parallel Synchronization and Communication Instructions", and "setmaxnreg".
#include <algorithm>
#include <cstring>

#include "machine/block.h"

namespace hopper {

// ---- warps

void sync_warp(uint32_t lanes) {
    together("__syncwarp", lanes, nullptr, [] {}, true);
}

namespace {

struct Exchange {
    uint64_t value;
    int from;
    uint64_t* result;
};

}  // namespace

uint64_t exchange(uint32_t lanes, uint64_t value, int from_lane) {
    uint64_t result = 0;
    Exchange const own = {value, from_lane, &result};
    together("__shfl_sync", lanes, &own, [&] {
        for (int lane = 0; lane < kWarp; ++lane) {
            if ((lanes >> lane & 1) == 0) continue;
            auto const& each = brought<Exchange>(lane);
            if ((lanes >> each.from & 1) == 0) {
                fail("__shfl_sync: lane %d asks lane %d, which is not here", lane, each.from);
            }
            *each.result = brought<Exchange>(each.from).value;
        }
    });
    return result;
}

uint32_t ballot(uint32_t lanes, bool value) {
    uint64_t result = 0;
    Exchange const own = {value, 0, &result};
    together("__ballot_sync", lanes, &own, [&] {
        uint32_t votes = 0;
        for (int lane = 0; lane < kWarp; ++lane) {
            if (lanes >> lane & 1) votes |= uint32_t(brought<Exchange>(lane).value) << lane;
        }
        for (int lane = 0; lane < kWarp; ++lane) {
            if (lanes >> lane & 1) *brought<Exchange>(lane).result = votes;
        }
    });
    return uint32_t(result);
}

bool elect_one() {
    together("elect.sync", kAll, nullptr, [] {});
    return lane_of(self()) == block().elected;
}

// ---- named barriers: of whole warps

namespace {

struct NamedCall {
    int barrier;
    int threads;
};

void arrive_at(NamedCall const& call, bool wait, char const* what) {
    auto const [number, threads] = call;
    int const warp = warp_of(self());
    if (number < 0 || number > 15) fail("%s: there is no named barrier %d", what, number);
    if (threads <= 0 || threads % kWarp != 0 || threads > int(block().fibers.size())) {
        fail("%s: named barrier %d of %d threads", what, number, threads);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        auto const& other = brought<NamedCall>(lane);
        if (other.barrier != number || other.threads != threads) fail("%s: lanes of warp %d differ", what, warp);
    }
    NamedBarrier& named = block().named[number];
    if (named.arrived == 0) named.threads = threads;
    if (named.threads != threads) {
        fail("%s: named barrier %d is of %d threads for warp %d, and of %d for one before", what, number, threads, warp,
             named.threads);
    }
    if (std::find(named.warps.begin(), named.warps.end(), warp) != named.warps.end()) {
        fail("%s: warp %d comes to named barrier %d twice before the others have come", what, warp, number);
    }
    named.arrived += kWarp;
    named.warps.push_back(warp);
    named.gathered.learn(self().clock);
    if (named.arrived == threads) {
        named.arrived = 0;
        named.warps.clear();
        named.published = named.gathered;
        wake_all(named.waiting);
    } else if (wait) {
        named.waiting.push_back(&self());
        block_for({Waiting::named, what, uint64_t(number)});
    }
    if (wait) self().clock.learn(named.published);
}

}  // namespace

void sync_named(int barrier, int threads) {
    NamedCall const call = {barrier, threads};
    together("barrier.sync", kAll, &call, [&] { arrive_at(call, true, "barrier.sync"); }, true);
}

void arrive_named(int barrier, int threads) {
    NamedCall const call = {barrier, threads};
    together("barrier.arrive", kAll, &call, [&] { arrive_at(call, false, "barrier.arrive"); }, true);
}

void sync_block() { sync_named(0, int(block().fibers.size())); }

// ---- the barrier of a cluster: of all threads that have not left the kernel

namespace {

void settle_cluster() {
    auto& barrier = machine.cluster_barrier;
    size_t unfinished = 0;
    for (auto const& each : machine.cluster) unfinished += each->unfinished;
    if (barrier.arrived == 0 || barrier.arrived < int(unfinished)) return;
    barrier.arrived = 0;
    barrier.published = barrier.gathered;
    wake_all(barrier.waiting);
}

}  // namespace

void leave_cluster_barrier() { settle_cluster(); }

void sync_cluster() {
    auto const come = [] {
        auto& barrier = machine.cluster_barrier;
        barrier.gathered.learn(self().clock);
        barrier.arrived += kWarp;
        barrier.waiting.push_back(&self());
        settle_cluster();
        if (!barrier.waiting.empty()) block_for({Waiting::cluster, "barrier.cluster"});
        self().clock.learn(barrier.published);
    };
    together("barrier.cluster", kAll, nullptr, come, true);
}

// ---- barriers in shared memory: "mbarrier"

namespace {

constexpr int64_t kMostArrivals = (1 << 20) - 1, kMostBytes = (1 << 20) - 1;

// A phase is over when all arrivals that it expects and all announced bytes have come.
void settle(uint32_t address, Barrier& barrier) {
    if (barrier.pending < 0) {
        fail("more threads arrive at a barrier than it expects: %s", describe(address, barrier).c_str());
    }
    if (barrier.bytes > kMostBytes || barrier.bytes < -kMostBytes) {
        fail("more bytes than a barrier can count: %s", describe(address, barrier).c_str());
    }
    if (barrier.pending > 0) return;
    if (barrier.bytes < 0) {
        fail("more bytes have come than were announced: %s", describe(address, barrier).c_str());
    }
    if (barrier.bytes > 0) return;
    ++barrier.phase;
    barrier.published = barrier.arrived;
    barrier.published.learn({barrier.component, uint32_t(barrier.phase)});
    barrier.pending = barrier.expected;
    wake_all(barrier.waiting);
}

}  // namespace

std::string describe(uint32_t address, Barrier const& barrier) {
    char text[160];
    snprintf(text, sizeof text, "the barrier at byte %u (phase %llu: %d of %d arrivals and %lld bytes are missing)",
             address - kSharedBase, (unsigned long long)barrier.phase, barrier.pending, barrier.expected,
             (long long)barrier.bytes);
    return text;
}

Stamp phase_of(uint32_t address) {
    Barrier const& barrier = barrier_at(address, "a copy");
    return {barrier.component, uint32_t(barrier.phase) + 1};
}

Barrier& barrier_at(uint32_t address, char const* what) {
    auto const found = block().barriers.find(address);
    if (found == block().barriers.end()) {
        fail("%s: there is no barrier at byte %lld of shared memory", what, (long long)address - kSharedBase);
    }
    return found->second;
}

void init_barrier(uint32_t address, int arrivals) {
    auto& clock = self().clock;
    block().shared.reserve(address, clock, clock.now(self().source));
    clock.step(self().source);
    if (arrivals < 1 || arrivals > kMostArrivals) fail("init_barrier: %d arrivals", arrivals);
    auto const [place, fresh] = block().barriers.try_emplace(address);
    Barrier& barrier = place->second;
    if (!fresh) fail("init_barrier: it has begun before: %s", describe(address, barrier).c_str());
    barrier.expected = barrier.pending = arrivals;
    barrier.component = new_component("the copies to barrier " + std::to_string(address - kSharedBase));
    barrier.arrived = barrier.published = new_clock();
}

void count_arrival(uint32_t address) {
    Barrier& barrier = barrier_at(address, "an arrival after copies");
    --barrier.pending;
    settle(address, barrier);
}

void count_bytes(uint32_t address, int64_t bytes) {
    Barrier& barrier = barrier_at(address, "a copy");
    barrier.bytes -= bytes;
    settle(address, barrier);
}

void arrive(uint32_t address, uint32_t expected_bytes) {
    if (machine.draw(8)) pause();
    Barrier& barrier = barrier_at(address, "arrive");
    block().shared.check_barrier(address, self().clock, true, "arrive");
    barrier.arrived.learn(self().clock);
    self().clock.step(self().source);
    barrier.bytes += expected_bytes;
    if (barrier.bytes > kMostBytes) settle(address, barrier);
    --barrier.pending;
    settle(address, barrier);
}

void arrive_remote(uint32_t address, int rank) {
    InBlock const there(block_of_cluster(rank, "arrive_remote"));
    Barrier& barrier = barrier_at(address, "arrive_remote");
    block().shared.check_barrier(address, self().clock, true, "arrive_remote");
    barrier.arrived.learn(self().clock);
    if (self().block != &block()) block().visits.push_back(self().clock.now(self().source));
    self().clock.step(self().source);
    --barrier.pending;
    settle(address, barrier);
}

void wait(uint32_t address, uint32_t parity) {
    Barrier& barrier = barrier_at(address, "wait");
    block().shared.check_barrier(address, self().clock, true, "wait");
    if (parity > 1) fail("wait: a parity of %u", parity);
    while ((barrier.phase & 1) == parity) {
        barrier.waiting.push_back(&self());
        block_for({Waiting::barrier, "wait", address, parity});
    }
    self().clock.learn(barrier.published);
    if (machine.draw(8)) pause();
}

void fence_async_proxy() {
    block().shared.fence();
    self().clock.fence();
    self().clock.step(self().source);
}

// ---- registers

namespace {

struct RegisterCall {
    int count;
    bool more;
};

}  // namespace

void change_registers(int count, bool more) {
    RegisterCall const call = {count, more};
    char const* const what = more ? "take_registers" : "give_registers";
    together(what, kAll, &call, [&] {
        int& held = block().warps[warp_of(self())].registers;
        if (count < 24 || count > 256 || count % 8 != 0) fail("%s: %d is no count of registers", what, count);
        if (more ? count < held : count > held) fail("%s: %d registers, where %d are held", what, count, held);
        int const wanted = (count - held) * kWarp;
        while (wanted > block().free_registers) {
            block().waiting_for_registers.push_back(&self());
            block_for({Waiting::registers, what, uint64_t(wanted)});
        }
        block().free_registers -= wanted;
        held = count;
        wake_all(block().waiting_for_registers);
    });
}

}  // namespace hopper
