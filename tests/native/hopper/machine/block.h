// A thread block of the emulated machine: fibers, and all that they share.
#pragma once

#include <csetjmp>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <ucontext.h>
#include <vector>

#include "machine/machine.h"
#include "machine/shared.h"

namespace hopper {

constexpr int kWarp = 32;
constexpr int kGroup = 128;
constexpr uint32_t kAll = ~0u;
constexpr int kSources = 192;  // of events beside threads: warpgroups, barriers, threads that store

struct Block;

// When asynchronous work is done.
enum class Timing { late, early, drawn };

// Who gets ahead of others.
enum class Favours { nobody, warps, lanes };

enum class Waiting { nothing, warp, barrier, named, cluster, issue, registers };

// What a thread waits for, for reports.
struct Reason {
    Waiting kind = Waiting::nothing;
    char const* what = "";
    uint64_t number = 0;
    uint64_t more = 0;
};

// What a thread brings to something that a warp does as one.
struct WarpCall {
    char const* what = "";
    uint32_t lanes = 0;
    void const* data = nullptr;
    bool tell = false;  // what one knows the others know afterwards
};

// A copy from shared to global memory, of a group of its thread.
struct Store {
    Block* block = nullptr;
    uint32_t from = 0;
    uint32_t bytes = 0;
    bool adds = false;
    float* to = nullptr;
    Box box;
    int at[4] = {};
    bool read = false;
    bool written = false;
    bool waited = false;  // its thread has waited for its read
    Stamp done;
    std::vector<uint8_t> held;
};

struct ChunkCopy {
    uint32_t to;
    uint32_t bytes;
    void const* from;
};

struct Fiber {
    Block* block = nullptr;
    int number = 0;
    int source = 0;  // of events: a component of clocks
    enum { ready, waiting, done } state = ready;
    bool started = false;
    ucontext_t entry;
    jmp_buf at;
    uint64_t favour = 0;
    uint64_t* stack = nullptr;  // its far end
    Reason reason;
    WarpCall call;
    Clock clock;
    std::vector<ChunkCopy> chunks;                       // begun, and followed by no arrival yet
    int store_component = -1;
    uint32_t begun_stores = 0;
    std::vector<std::shared_ptr<Store>> open;            // of no group yet
    std::deque<std::vector<std::shared_ptr<Store>>> stores;  // groups
};

struct Barrier {
    int expected = 0;
    int pending = 0;
    int64_t bytes = 0;
    uint64_t phase = 0;
    int component = 0;
    Clock arrived;    // what those who arrive know
    Clock published;  // at the end of the last phase
    std::vector<Fiber*> waiting;
};

struct NamedBarrier {
    int threads = 0;
    int arrived = 0;
    std::vector<int> warps;
    Clock gathered;
    Clock published;
    std::vector<Fiber*> waiting;
};

// On its way to shared memory: a run of bytes, a box, or the chunks of a thread.
struct Copy {
    enum { bulk, box, chunks } kind = bulk;
    Block* block = nullptr;
    uint32_t to = 0;
    uint32_t bytes = 0;
    char const* from = nullptr;
    Box map;
    int at[4] = {};
    uint32_t barrier = 0;
    int thread = 0;  // of chunks
    std::vector<ChunkCopy> pieces;
};

// The sums of products that follow each other in the same registers.
struct Sums {
    int columns = 0;
    std::vector<float> values;  // 64 rows
    float* registers[kGroup] = {};
};

struct Product {
    ProductCall call;
    std::shared_ptr<Sums> sums;
    std::vector<uint32_t> a;  // addresses of 16-byte chunks
    std::vector<uint32_t> b;
    uint32_t const* fragments[kGroup] = {};
    uint32_t held[kGroup][4] = {};
    bool commit = false;  // not a product, but the end of a group
    int warps = 0;        // that have asked for it
    Clock known;          // to all of them
    bool computed = false;
    bool finished = false;
};

struct Warp {
    uint64_t next = 0;     // number of its next product or commit
    bool fenced = false;
    std::vector<uint64_t> groups;  // numbers of its commits
    struct Held {
        std::shared_ptr<Sums> sums;
        uint64_t last;     // product
    };
    std::vector<Held> held;
    int registers = 0;
};

struct Group {
    std::deque<std::unique_ptr<Product>> products;
    uint64_t first = 0;     // number of products.front()
    uint64_t computed = 0;  // all before this one are
    int component = 0;
    std::vector<Fiber*> waiting;

    Product& at(uint64_t number) { return *products[number - first]; }
    uint64_t end() const { return first + products.size(); }
};

struct Block {
    Block(Shape const& shape, Index const& index, int rank);

    Shape shape;
    Index index;
    int rank;  // in its cluster
    size_t unfinished;          // threads
    std::vector<Stamp> visits;  // of copies and other blocks to its memory
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<Group> groups;
    Shared shared;
    std::map<uint32_t, Barrier> barriers;
    NamedBarrier named[16];
    int free_registers = 0;
    std::vector<Fiber*> waiting_for_registers;
    int elected = 0;
};

// ---- the launch under way (launch.cpp)

struct Machine {
    uint64_t seed = 0;
    int processors = 3;
    Timing copy_timing = Timing::late;
    Timing product_timing = Timing::late;
    Favours favours = Favours::nobody;
    std::mt19937_64 random;
    std::vector<std::unique_ptr<Block>> cluster;  // blocks under way together
    NamedBarrier cluster_barrier;
    std::vector<Fiber*> ready;
    std::vector<Copy> copies;
    std::vector<std::shared_ptr<Store>> stores;
    std::vector<std::string> sources;  // of the components of clocks, by name
    Block* block = nullptr;            // that of what happens
    Fiber* running = nullptr;
    std::string fault;

    // An event in one of `count` cases.
    bool draw(int count) { return random() % count == 0; }
};

extern Machine machine;

inline Block& block() { return *machine.block; }
inline Fiber& self() { return *machine.running; }
inline int warp_of(Fiber const& fiber) { return fiber.number / kWarp; }
inline int lane_of(Fiber const& fiber) { return fiber.number % kWarp; }

// For what happens to a block that is not the running thread's.
class InBlock {
public:
    explicit InBlock(Block& block) : before_(machine.block) { machine.block = &block; }
    ~InBlock() { machine.block = before_; }
    InBlock(InBlock const&) = delete;
    InBlock& operator=(InBlock const&) = delete;

private:
    Block* before_;
};

// A block of the cluster that still runs.
Block& block_of_cluster(int rank, char const* what);

// A component of clocks for a source of events.
int new_component(std::string const& source);
Clock new_clock();
std::string source_of(Stamp const& stamp);

// Memory of a tensor; all that a kernel may touch.
void check_global(void const* pointer, uint64_t bytes, char const* what);

// ---- fibers (fibers.cpp)

void draw_favour(Block& block);
void pause();                       // lets others run
void block_for(Reason const& why);  // until woken
void wake(Fiber& fiber);
void wake_all(std::vector<Fiber*>& fibers);
void run_cluster(std::function<void()> const& kernel);

// True in the thread that arrives last and acts for the lanes; the others return when it has released them.
bool gather(char const* what, uint32_t lanes, void const* data, bool tell);
void release();

template <class T>
T const& brought(int lane) {
    return *static_cast<T const*>(block().fibers[warp_of(self()) * kWarp + lane].call.data);
}

// `tell`: it orders memory accesses, as barriers do and shuffles do not.
template <class Action>
void together(char const* what, uint32_t lanes, void const* data, Action const& action, bool tell = false) {
    if (!gather(what, lanes, data, tell)) return;
    action();
    release();
}

// ---- asynchronous work

Barrier& barrier_at(uint32_t address, char const* what);
void count_arrival(uint32_t barrier);
void count_bytes(uint32_t barrier, int64_t bytes);
Stamp phase_of(uint32_t barrier);  // the one under way
std::string describe(uint32_t address, Barrier const& barrier);

void leave_cluster_barrier();  // barriers.cpp; when a thread leaves the kernel
bool land_some_copy();    // copies.cpp; false where none is under way
bool do_some_store();
void finish_stores();
bool compute_some_product();  // products.cpp
void check_no_products();

}  // namespace hopper
