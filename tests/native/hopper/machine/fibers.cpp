// Threads of a block: who runs, who waits for whom.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "machine/block.h"

namespace hopper {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr unsigned kStackBytes = 128 * 1024;

jmp_buf scheduler;
std::function<void()> const* kernel_of_fibers = nullptr;

// Stacks outlive blocks. Below each lies a page that nobody may touch.
char* stack_of(int number) {
    static std::vector<char*> stacks;
    auto const page = unsigned(sysconf(_SC_PAGESIZE));
    while (int(stacks.size()) <= number) {
        void* const mapped = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) fail("no memory for the stack of a thread");
        mprotect(mapped, page, PROT_NONE);
        stacks.push_back(static_cast<char*>(mapped) + page);
    }
    return stacks[number];
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
    Index const size = block_size;
    unsigned const n = unsigned(fiber.number);
    thread_index = {n % size.x, n / size.x % size.y, n / (size.x * size.y)};
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.entry);
}

void prepare(Fiber& fiber) {
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = stack_of(fiber.number);
    fiber.entry.uc_stack.ss_size = kStackBytes;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, enter, 0);
    block().ready.push_back(&fiber);
}

bool drawn(Timing timing) { return timing == Timing::drawn && machine.draw(4); }

// Something asynchronous that may happen now, whoever waits for it.
void drift() {
    if (drawn(machine.copies)) land_some_copy();
    if (drawn(machine.copies)) do_some_store();
    if (drawn(machine.products)) compute_some_product();
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
        case Waiting::issue: return "the rest of its warpgroup to ask for the same products";
        case Waiting::registers:
            snprintf(text, sizeof text, "%llu registers (%d are free)", number, block().free_registers);
            return text;
    }
    return "";
}

}  // namespace

void pause() {
    block().ready.push_back(&self());
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
    block().ready.push_back(&fiber);
}

void wake_all(std::vector<Fiber*>& fibers) {
    for (Fiber* const fiber : fibers) wake(*fiber);
    fibers.clear();
}

// One line for all neighbouring threads that wait for the same.
std::string who_waits() {
    std::string report, last;
    int first = 0;
    auto const& fibers = block().fibers;
    auto const close = [&](int end) {
        if (last.empty()) return;
        report += "\n  threads " + std::to_string(first) + " to " + std::to_string(end - 1) + " wait for " + last;
    };
    for (auto const& fiber : fibers) {
        std::string const now = fiber.state == Fiber::done ? "" : words(fiber.reason);
        if (now == last) continue;
        close(fiber.number);
        last = now, first = fiber.number;
    }
    close(int(fibers.size()));
    return report;
}

void run_block(std::function<void()> const& kernel) {
    kernel_of_fibers = &kernel;
    for (auto& fiber : block().fibers) prepare(fiber);
    auto& ready = block().ready;
    size_t unfinished = block().fibers.size();
    while (unfinished > 0) {
        if (ready.empty()) {
            if (land_some_copy()) continue;
            fail("deadlock%s", who_waits().c_str());
        }
        std::swap(ready[machine.random() % ready.size()], ready.back());
        Fiber& fiber = *ready.back();
        ready.pop_back();
        resume(fiber);
        machine.running = nullptr;
        unfinished -= fiber.state == Fiber::done;
        drift();
    }
}

bool gather(char const* what, uint32_t lanes, void const* data) {
    Fiber& own = self();
    own.call = {what, lanes, data};
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
    return true;
}

void release(uint32_t lanes) {
    Fiber* const warp = &block().fibers[warp_of(self()) * kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
        if ((lanes >> lane & 1) && &warp[lane] != &self()) wake(warp[lane]);
    }
    if (machine.draw(2)) pause();
}

}  // namespace hopper
