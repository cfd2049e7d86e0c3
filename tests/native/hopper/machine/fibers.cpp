// Threads of a block: who runs, who waits for whom.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "machine/block.h"

namespace hopper {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr unsigned kStackBytes = 128 * 1024;
constexpr uint64_t kStackEnd = 0x656e64206f662069;

jmp_buf scheduler;
std::function<void()> const* kernel_of_fibers = nullptr;

// Stacks outlive blocks; `number` is that of a thread in its cluster. Those of a warp share a mapping: a process may
// have some ten thousand of these only. What lies at the end of a stack tells when it was too small.
char* stack_of(int number) {
    static std::vector<char*> warps;
    while (int(warps.size()) <= number / kWarp) {
        void* const mapped = mmap(nullptr, kWarp * kStackBytes, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED) fail("no memory for the stacks of a warp");
        warps.push_back(static_cast<char*>(mapped));
    }
    return warps[size_t(number / kWarp)] + number % kWarp * kStackBytes;
}

void enter() {
    (*kernel_of_fibers)();
    self().state = Fiber::done;
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) void leave() {
    if (_setjmp(self().at) == 0) _longjmp(scheduler, 1);
}

__attribute__((noinline)) void resume(Fiber& fiber) {
    if (_setjmp(scheduler) != 0) return;
    machine.running = &fiber;
    machine.block = fiber.block;
    block_index = fiber.block->index;
    Index const size = block_size;
    unsigned const n = unsigned(fiber.number);
    thread_index = {n % size.x, n / size.x % size.y, n / (size.x * size.y)};
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.entry);
}

void prepare(Fiber& fiber) {
    getcontext(&fiber.entry);
    Block const& own = *fiber.block;
    fiber.stack = reinterpret_cast<uint64_t*>(stack_of(own.rank * int(own.fibers.size()) + fiber.number));
    *fiber.stack = kStackEnd;
    fiber.entry.uc_stack.ss_sp = fiber.stack;
    fiber.entry.uc_stack.ss_size = kStackBytes;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, enter, 0);
    machine.ready.push_back(&fiber);
}

bool drawn(Timing timing) { return timing == Timing::drawn && machine.draw(4); }

// Who runs: anyone, or whoever is in favour until that changes. The former mixes threads; favour lets a warp run as far
// as barriers let it, or leaves lanes of a warp behind.
Fiber& next_of(std::vector<Fiber*>& ready) {
    if (machine.draw(2048)) draw_favour(*machine.cluster[machine.random() % machine.cluster.size()]);
    size_t chosen = machine.random() % ready.size();
    for (size_t i = 0; i < ready.size() && machine.favours != Favours::nobody; ++i) {
        if (ready[i]->favour > ready[chosen]->favour) chosen = i;
    }
    std::swap(ready[chosen], ready.back());
    Fiber& fiber = *ready.back();
    ready.pop_back();
    return fiber;
}

// Something asynchronous that may happen now, whoever waits for it.
void drift() {
    if (drawn(machine.copy_timing)) land_some_copy();
    if (drawn(machine.copy_timing)) do_some_store();
    if (drawn(machine.product_timing)) compute_some_product();
}

std::string words(Reason const& reason) {
    char text[160];
    auto const number = (unsigned long long)reason.number;
    switch (reason.kind) {
        case Waiting::nothing: return "nothing";
        case Waiting::warp: return std::string("the rest of its warp at ") + reason.what;
        case Waiting::barrier: {
            auto const& barrier = block().barriers.at(uint32_t(number));
            return describe(uint32_t(number), barrier) + ", parity " + std::to_string(reason.more);
        }
        case Waiting::named: {
            auto const& named = block().named[number];
            snprintf(text, sizeof text, "named barrier %llu (%d of %d threads are there)", number, named.arrived,
                     named.threads);
            return text;
        }
        case Waiting::cluster: return "the other blocks of the cluster";
        case Waiting::issue: return "the rest of its warpgroup to ask for the same products";
        case Waiting::registers:
            snprintf(text, sizeof text, "%llu registers (%d are free)", number, block().free_registers);
            return text;
    }
    return "";
}

}  // namespace

// Of warps, or of all but some lanes of one warp: often of the first, which is the one that fetches.
void draw_favour(Block& block) {
    bool const lanes = machine.favours == Favours::lanes;
    int const behind = machine.draw(2) ? 0 : int(machine.random() % block.warps.size());
    for (auto& fiber : block.fibers) {
        if (lanes) {
            fiber.favour = warp_of(fiber) != behind || machine.draw(2);
        } else {
            fiber.favour = lane_of(fiber) == 0 ? machine.random() : (&fiber - 1)->favour;
        }
    }
}

void pause() {
    machine.ready.push_back(&self());
    leave();
}

void block_for(Reason const& why) {
    self().reason = why;
    self().state = Fiber::waiting;
    leave();
    self().reason = {};
}

void wake(Fiber& fiber) {
    if (fiber.state != Fiber::waiting) return;
    fiber.state = Fiber::ready;
    machine.ready.push_back(&fiber);
}

void wake_all(std::vector<Fiber*>& fibers) {
    for (Fiber* const fiber : fibers) wake(*fiber);
    fibers.clear();
}

namespace {

// One line for all neighbouring threads that wait for the same.
std::string who_waits_in(Block const& block) {
    std::string report, last;
    int first = 0;
    auto const close = [&](int end) {
        if (last.empty()) return;
        report += "\n  threads " + std::to_string(first) + " to " + std::to_string(end - 1) + " of block " +
                  std::to_string(block.index.x) + " wait for " + last;
    };
    for (auto const& fiber : block.fibers) {
        std::string const now = fiber.state == Fiber::done ? "" : words(fiber.reason);
        if (now == last) continue;
        close(fiber.number);
        last = now, first = fiber.number;
    }
    close(int(block.fibers.size()));
    return report;
}

std::string who_waits() {
    std::string report;
    for (auto const& each : machine.cluster) {
        InBlock const there(*each);
        report += who_waits_in(*each);
    }
    return report;
}

// No kernel that is known to work leaves copies behind which the thread itself has begun: what becomes of them then is
// written nowhere.
void check_no_chunks(Fiber const& fiber) {
    bool left = !fiber.chunks.empty();
    for (auto const& copy : machine.copies) {
        left = left || (copy.kind == Copy::chunks && copy.block == fiber.block && copy.thread == fiber.number);
    }
    if (left) fail("thread %d leaves the kernel while its copy_chunk is under way", fiber.number);
}

// A block must know of everything that others do to its memory before it ends.
void end_thread(Fiber& fiber) {
    check_no_chunks(fiber);
    Block& own = *fiber.block;
    --own.unfinished;
    leave_cluster_barrier();
    if (own.unfinished > 0) return;
    for (auto const& copy : machine.copies) {
        if (copy.block == &own) fail("block %u ends while copies are under way to its shared memory", own.index.x);
    }
    Clock known = new_clock();
    for (auto const& each : own.fibers) known.learn(each.clock);
    for (auto const& stamp : own.visits) {
        if (known.knows(stamp)) continue;
        fail("block %u may end before %s has reached its shared memory: no wait or barrier says that it has",
             own.index.x, source_of(stamp).c_str());
    }
}

}  // namespace

void run_cluster(std::function<void()> const& kernel) {
    kernel_of_fibers = &kernel;
    size_t unfinished = 0;
    for (auto const& each : machine.cluster) {
        unfinished += each->fibers.size();
        for (auto& fiber : each->fibers) prepare(fiber);
    }
    while (unfinished > 0) {
        if (machine.ready.empty()) {
            if (land_some_copy()) continue;
            fail("deadlock%s", who_waits().c_str());
        }
        Fiber& fiber = next_of(machine.ready);
        resume(fiber);
        if (*fiber.stack != kStackEnd) fail("a thread's stack of %u bytes is too small here", kStackBytes);
        machine.running = nullptr;
        if (fiber.state == Fiber::done) end_thread(fiber), --unfinished;
        drift();
    }
}

bool gather(char const* what, uint32_t lanes, void const* data, bool tell) {
    Fiber& own = self();
    own.call = {what, lanes, data, tell};
    if ((lanes >> lane_of(own) & 1) == 0) fail("%s: thread %d is not of its own mask", what, own.number);
    Fiber* const warp = &block().fibers[warp_of(own) * kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
        Fiber& other = warp[lane];
        if ((lanes >> lane & 1) == 0 || &other == &own) continue;
        if (other.state == Fiber::done) {
            fail("%s: thread %d waits for thread %d, which has left the kernel", what, own.number, other.number);
        }
        bool const here = other.state == Fiber::waiting && other.reason.kind == Waiting::warp;
        if (here && (other.call.lanes != lanes || std::string(other.call.what) != what)) {
            fail("threads of a warp part: %d is at %s, %d at %s", own.number, what, other.number, other.call.what);
        }
        if (!here) {
            block_for({Waiting::warp, what});
            return false;
        }
    }
    for (int lane = 0; lane < kWarp && tell; ++lane) {
        if (lanes >> lane & 1) own.clock.learn(warp[lane].clock);
    }
    return true;
}

void release() {
    Fiber& own = self();
    Fiber* const warp = &block().fibers[warp_of(own) * kWarp];
    uint32_t const lanes = own.call.lanes;
    for (int lane = 0; lane < kWarp; ++lane) {
        if ((lanes >> lane & 1) == 0 || &warp[lane] == &own) continue;
        if (own.call.tell) {
            warp[lane].clock = own.clock;
            warp[lane].clock.step(warp[lane].source);
        }
        wake(warp[lane]);
    }
    own.clock.step(own.source);
    if (machine.draw(2)) pause();
}

}  // namespace hopper
