// Launches: blocks one after the other, their end, and what stops them.
#include <csignal>
#include <cstdarg>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "machine/block.h"

namespace hopper {

Machine machine;

namespace {

constexpr unsigned kMostShared = 227 * 1024;
constexpr int kRegisters = 64 * 1024;  // of a block at most, and 255 of a thread

// A run of bytes that kernels may touch.
struct Region {
    char const* begin;
    char const* end;
};

std::vector<Region> regions;
sigjmp_buf way_out;
bool launched = false;

// A touch of a page that is nobody's.
void stop_at_page(int signal, siginfo_t* info, void*) {
    auto const* const address = static_cast<char const*>(info->si_addr);
    auto const thread = machine.running == nullptr ? -1 : machine.running->number;
    Region const* nearest = nullptr;
    auto const distance = [&](Region const& r) {
        return address < r.begin ? r.begin - address : address >= r.end ? address - r.end + 1 : 0;
    };
    for (auto const& region : regions) {
        if (nearest == nullptr || distance(region) < distance(*nearest)) nearest = &region;
    }
    char text[256];
    snprintf(text, sizeof text,
             "signal %d: thread %d of block (%u, %u, %u) touches %p, which is %+lld bytes from the beginning of the "
             "nearest tensor, of %lld", signal, thread, block_index.x, block_index.y, block_index.z,
             static_cast<void const*>(address), nearest ? (long long)(address - nearest->begin) : 0,
             nearest ? (long long)(nearest->end - nearest->begin) : 0);
    machine.fault = text;
    siglongjmp(way_out, 1);
}

// Handlers of its own while a launch lasts.
class Guard {
public:
    Guard() {
        static char stack[64 * 1024];
        stack_t const own = {stack, 0, sizeof stack};
        sigaltstack(&own, &old_stack_);
        struct sigaction action = {};
        action.sa_sigaction = stop_at_page;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &old_segv_);
        sigaction(SIGBUS, &action, &old_bus_);
        sigaction(SIGFPE, &action, &old_division_);
    }
    ~Guard() {
        sigaction(SIGSEGV, &old_segv_, nullptr);
        sigaction(SIGBUS, &old_bus_, nullptr);
        sigaction(SIGFPE, &old_division_, nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

private:
    stack_t old_stack_;
    struct sigaction old_segv_, old_bus_, old_division_;
};

Index place_of(Index const& grid, uint64_t number) {
    return {unsigned(number % grid.x), unsigned(number / grid.x % grid.y), unsigned(number / grid.x / grid.y)};
}

void forget_cluster() {
    machine.running = nullptr;
    machine.block = nullptr;
    machine.copies.clear();
    machine.stores.clear();
    machine.ready.clear();
    machine.cluster.clear();
    machine.sources.clear();
}

// Blocks of a cluster follow each other.
void begin_cluster(Shape const& shape, uint64_t number) {
    forget_cluster();
    machine.cluster.resize(shape.cluster);
    for (unsigned rank = 0; rank < shape.cluster; ++rank) {
        Index const index = place_of(shape.grid, number * shape.cluster + rank);
        machine.cluster[rank] = std::make_unique<Block>(shape, index, int(rank));
    }
    machine.cluster_barrier = {};
    machine.cluster_barrier.gathered = machine.cluster_barrier.published = new_clock();
}

void run_blocks(Shape const& shape, std::function<void()> const& kernel) {
    uint64_t const count = uint64_t(shape.grid.x) * shape.grid.y * shape.grid.z / shape.cluster;
    std::vector<uint64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), machine.random);
    grid_size = shape.grid, block_size = shape.block;
    for (uint64_t const number : order) {
        begin_cluster(shape, number);
        run_cluster(kernel);
        finish_stores();
        for (auto const& each : machine.cluster) {
            InBlock const there(*each);
            check_no_products();
            if (!each->shared.intact()) fail("bytes before or after the shared memory of a block were written");
        }
    }
}

// The part that a fault leaves by a jump: no object of its own needs an end.
bool run_to_the_end(Shape const& shape, std::function<void()> const& kernel) {
    if (sigsetjmp(way_out, 1) != 0) return false;
    run_blocks(shape, kernel);
    return true;
}

void set_timings() {
    constexpr Timing kTimings[][2] = {{Timing::late, Timing::late},
                                      {Timing::early, Timing::early},
                                      {Timing::early, Timing::late},
                                      {Timing::late, Timing::early}};
    bool const extreme = machine.seed < 4;
    machine.copy_timing = extreme ? kTimings[machine.seed][0] : Timing::drawn;
    machine.product_timing = extreme ? kTimings[machine.seed][1] : Timing::drawn;
    machine.favours = machine.seed % 2 == 1   ? Favours::warps
                      : machine.seed % 4 == 2 ? Favours::lanes
                                              : Favours::nobody;
    machine.random.seed(machine.seed);
}

}  // namespace

Block::Block(Shape const& given, Index const& place, int place_in_cluster)
    : shape(given),
      index(place),
      rank(place_in_cluster),
      fibers(size_t(given.block.x) * given.block.y * given.block.z),
      warps(fibers.size() / kWarp),
      groups((fibers.size() + kGroup - 1) / kGroup),
      shared(given.shared_bytes) {
    unfinished = fibers.size();
    for (size_t i = 0; i < fibers.size(); ++i) {
        fibers[i].block = this;
        fibers[i].number = int(i);
        fibers[i].source = new_component("thread " + std::to_string(i));
        fibers[i].clock = Clock(int(given.cluster * (fibers.size() + kSources)));
        fibers[i].clock.step(fibers[i].source);
    }
    for (size_t i = 0; i < groups.size(); ++i) {
        groups[i].component = new_component("a product of warpgroup " + std::to_string(i));
    }
    for (auto& barrier : named) barrier.gathered = barrier.published = Clock(fibers[0].clock.components());
    int const each = std::min(256, kRegisters / int(fibers.size()) / 8 * 8);
    for (auto& warp : warps) warp.registers = each;
    elected = int(machine.random() % kWarp);
    draw_favour(*this);
}

Block& block_of_cluster(int rank, char const* what) {
    if (rank < 0 || rank >= int(machine.cluster.size())) {
        fail("%s: block %d of a cluster of %zu", what, rank, machine.cluster.size());
    }
    Block& found = *machine.cluster[size_t(rank)];
    if (found.unfinished == 0) fail("%s: block %d of the cluster has ended", what, rank);
    return found;
}

Clock new_clock() { return Clock(machine.cluster[0]->fibers[0].clock.components()); }

int new_component(std::string const& source) {
    machine.sources.push_back(source);
    if (machine.cluster[0] && int(machine.sources.size()) > machine.cluster[0]->fibers[0].clock.components()) {
        fail("too many barriers or threads that store");
    }
    return int(machine.sources.size()) - 1;
}

std::string source_of(Stamp const& stamp) {
    return stamp.component < 0 ? "nobody" : machine.sources[size_t(stamp.component)];
}

void fail(char const* format, ...) {
    char text[8192];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (!launched) throw std::runtime_error(text);
    char where[96] = "";
    if (machine.running != nullptr) {
        snprintf(where, sizeof where, "thread %d of block (%u, %u, %u): ", machine.running->number, block_index.x,
                 block_index.y, block_index.z);
    }
    machine.fault = std::string(where) + text;
    siglongjmp(way_out, 1);
}

void check_global(void const* pointer, uint64_t bytes, char const* what) {
    auto const* const begin = static_cast<char const*>(pointer);
    for (auto const& region : regions) {
        if (begin >= region.begin && begin + bytes <= region.end) return;
    }
    fail("%s: %llu bytes at %p are not of one of the tensors", what, (unsigned long long)bytes, pointer);
}

char* dynamic_shared() { return block().shared.data(); }
uint32_t shared_address(void const* pointer) { return block().shared.address_of(pointer); }

int processors() { return machine.processors; }

void launch(Shape const& shape, std::function<void()> const& kernel) {
    unsigned const threads = shape.block.x * shape.block.y * shape.block.z;
    if (threads == 0 || threads > 1024 || threads % kWarp != 0) fail("a block of %u threads", threads);
    if (shape.shared_bytes > kMostShared) fail("a block with %u bytes of shared memory", shape.shared_bytes);
    if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0 || shape.grid.y > 65535 || shape.grid.z > 65535) {
        fail("a grid of %u x %u x %u blocks", shape.grid.x, shape.grid.y, shape.grid.z);
    }
    if (shape.cluster == 0 || shape.cluster > 8 || shape.grid.x % shape.cluster != 0) {
        fail("%u blocks in clusters of %u", shape.grid.x, shape.cluster);
    }
    set_timings();
    Guard const guard;
    launched = true;
    bool const done = run_to_the_end(shape, kernel);
    launched = false;
    forget_cluster();
    if (!done) throw std::runtime_error(machine.fault);
}

char const* attempt(std::function<void()> const& call) {
    static std::string words;
    try {
        call();
        return nullptr;
    } catch (std::exception const& fault) {
        words = fault.what();
        return words.c_str();
    }
}

}  // namespace hopper

extern "C" {

void hopper_prepare(uint64_t seed, int processors) {
    hopper::machine.seed = seed;
    hopper::machine.processors = processors;
    hopper::regions.clear();
}

void hopper_allow(char const* begin, uint64_t bytes) { hopper::regions.push_back({begin, begin + bytes}); }

}  // extern "C"
