// Copies between global and shared memory: PTX ISA, "cp.async", "cp.async.bulk", "cp.async.bulk.tensor",
// "cp.reduce.async.bulk", "stmatrix".
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "machine/block.h"

namespace hopper {
namespace {

uint32_t box_bytes(Box const& map) {
    return uint32_t(map.box[0]) * map.box[1] * map.box[2] * map.box[3] * map.width;
}

Box decoded(void const* map, char const* what) {
    if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail("%s: a tensor map must lie at a multiple of 64", what);
    Box box;
    std::memcpy(&box, map, sizeof box);
    if (box.mark != kMapMark) fail("%s: this is no tensor map", what);
    return box;
}

// Every row of a box: its offset within the box, from the box's first byte; where it is in global memory and how many
// bytes before and within it are of the tensor.
template <class Visit>
void visit_rows(Box const& map, int const (&at)[4], Visit const& visit) {
    uint32_t offset = 0;
    int64_t const begin = std::max<int64_t>(at[0], 0);
    int64_t const end = std::min<int64_t>(int64_t(at[0]) + map.box[0], map.sizes[0]);
    auto const inside = [&](int64_t n, int dimension) { return n >= 0 && n < int64_t(map.sizes[dimension]); };
    for (int i3 = 0; i3 < map.box[3]; ++i3)
        for (int i2 = 0; i2 < map.box[2]; ++i2)
            for (int i1 = 0; i1 < map.box[1]; ++i1, offset += map.box[0] * map.width) {
                int64_t const n1 = int64_t(at[1]) + i1, n2 = int64_t(at[2]) + i2, n3 = int64_t(at[3]) + i3;
                if (begin >= end || !inside(n1, 1) || !inside(n2, 2) || !inside(n3, 3)) continue;
                char* const row = map.data + begin * map.width + n1 * map.strides[1] + n2 * map.strides[2] +
                                  n3 * map.strides[3];
                visit(row, uint32_t((end - begin) * map.width), offset + uint32_t(begin - at[0]) * map.width);
            }
}

// Chunks of a box change places, or not.
std::vector<uint8_t> arranged(Box const& map, uint32_t address, std::vector<uint8_t> const& bytes) {
    if (!map.swizzled) return bytes;
    std::vector<uint8_t> result(bytes.size());
    for (uint32_t i = 0; i < bytes.size(); i += kChunk) {
        std::memcpy(&result[swizzled(address + i) - address], &bytes[i], kChunk);
    }
    return result;
}

void land_box(Copy const& copy) {
    std::vector<uint8_t> bytes(copy.bytes);
    visit_rows(copy.map, copy.at, [&](char const* row, uint32_t count, uint32_t offset) {
        check_global(row, count, "copy_tensor");
        std::memcpy(&bytes[offset], row, count);
    });
    bytes = arranged(copy.map, copy.to, bytes);
    block().shared.land(copy.to, bytes.data(), copy.bytes, phase_of(copy.barrier), false);
}

void land_chunks(Copy const& copy) {
    for (auto const& piece : copy.pieces) {
        uint8_t bytes[kChunk] = {};
        if (piece.bytes > 0) check_global(piece.from, piece.bytes, "copy_chunk");
        std::memcpy(bytes, piece.from, piece.bytes);
        block().shared.land(piece.to, bytes, kChunk, phase_of(copy.barrier), true);
    }
    count_arrival(copy.barrier);
}

void land(Copy const& copy) {
    InBlock const there(*copy.block);
    block().visits.push_back(phase_of(copy.barrier));
    if (copy.kind == Copy::chunks) return land_chunks(copy);
    if (copy.kind == Copy::box) {
        land_box(copy);
    } else {
        check_global(copy.from, copy.bytes, "copy_bulk");
        block().shared.land(copy.to, copy.from, copy.bytes, phase_of(copy.barrier), false);
    }
    count_bytes(copy.barrier, copy.bytes);
}

void begin(Copy&& copy) {
    copy.block = &block();
    if (machine.copy_timing == Timing::early) return land(copy);
    machine.copies.push_back(std::move(copy));
}

void begin_shared(Copy& copy, uint32_t multiple, char const* what) {
    block().shared.at(copy.to, copy.bytes, multiple, what);
    barrier_at(copy.barrier, what);
    block().shared.check_barrier(copy.barrier, self().clock, false, "the barrier of a copy");
    block().shared.begin_copy(copy.to, copy.bytes, self().clock, false, what);
}

}  // namespace

// One of those under way; those of a thread by cp.async come in order.
bool land_some_copy() {
    auto& copies = machine.copies;
    if (copies.empty()) return false;
    size_t chosen = machine.random() % copies.size();
    if (copies[chosen].kind == Copy::chunks) {
        auto const same = [&](Copy const& c) {
            return c.kind == Copy::chunks && c.block == copies[chosen].block && c.thread == copies[chosen].thread;
        };
        chosen = size_t(std::find_if(copies.begin(), copies.end(), same) - copies.begin());
    }
    Copy const copy = std::move(copies[chosen]);
    copies.erase(copies.begin() + long(chosen));
    land(copy);
    return true;
}

void copy_chunk(uint32_t to, void const* from, uint32_t bytes) {
    if (bytes > kChunk) fail("copy_chunk: %u bytes of 16", bytes);
    if (reinterpret_cast<uintptr_t>(from) % kChunk != 0) fail("copy_chunk: a source that is no multiple of 16");
    block().shared.begin_copy(to, kChunk, self().clock, true, "copy_chunk");
    self().chunks.push_back({to, bytes, from});
}

void arrive_after_copies(uint32_t barrier) {
    barrier_at(barrier, "arrive_after_copies");
    Copy copy;
    copy.kind = Copy::chunks;
    copy.barrier = barrier;
    copy.thread = self().number;
    copy.pieces.swap(self().chunks);
    begin(std::move(copy));
}

void copy_bulk(uint32_t to, void const* from, uint32_t bytes, uint32_t barrier) {
    if (bytes == 0 || bytes % kChunk != 0) fail("copy_bulk: %u bytes, which is no multiple of 16", bytes);
    if (reinterpret_cast<uintptr_t>(from) % kChunk != 0) fail("copy_bulk: a source that is no multiple of 16");
    Copy copy;
    copy.to = to, copy.bytes = bytes, copy.from = static_cast<char const*>(from), copy.barrier = barrier;
    begin_shared(copy, kChunk, "copy_bulk");
    begin(std::move(copy));
}

void prefetch_map(void const* map) { decoded(map, "prefetch_map"); }

void copy_tensor(uint32_t to, void const* map, int const (&at)[4], uint32_t barrier) {
    Copy copy;
    copy.kind = Copy::box;
    copy.map = decoded(map, "copy_tensor");
    copy.to = to, copy.bytes = box_bytes(copy.map), copy.barrier = barrier;
    std::copy(at, at + 4, copy.at);
    begin_shared(copy, copy.map.swizzled ? 1024 : 128, "copy_tensor");
    begin(std::move(copy));
}

void copy_tensor_to_cluster(uint32_t to, void const* map, int const (&at)[4], uint32_t barrier, uint32_t blocks) {
    if (blocks == 0) fail("copy_tensor_to_cluster: to no block");
    for (int rank = 0; rank < 16; ++rank) {
        if ((blocks >> rank & 1) == 0) continue;
        InBlock const there(block_of_cluster(rank, "copy_tensor_to_cluster"));
        copy_tensor(to, map, at, barrier);
    }
}

// ---- stores

namespace {

void read_shared(Store& store) {
    if (store.read) return;
    store.read = true;
    char const* const from = block().shared.at(store.from, store.bytes, kChunk, "a store");
    store.held.assign(from, from + store.bytes);
}

float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

void add(Store const& store) {
    check_global(store.to, store.held.size(), "reduce_add");
    for (size_t i = 0; i < store.held.size() / 4; ++i) {
        float value;
        std::memcpy(&value, &store.held[4 * i], 4);
        store.to[i] = flushed(flushed(store.to[i]) + flushed(value));
    }
}

void write_box(Store const& store) {
    // swizzling is its own inverse
    auto const bytes = arranged(store.box, store.from, store.held);
    visit_rows(store.box, store.at, [&](char* row, uint32_t count, uint32_t offset) {
        check_global(row, count, "store_tensor");
        std::memcpy(row, &bytes[offset], count);
    });
}

void write_global(Store& store) {
    if (store.written) return;
    store.written = true;
    InBlock const there(*store.block);
    read_shared(store);
    if (store.adds) {
        add(store);
    } else {
        write_box(store);
    }
}

void begin_store(Store&& store, uint32_t multiple, char const* what) {
    auto& shared = block().shared;
    shared.at(store.from, store.bytes, multiple, what);
    Fiber& own = self();
    if (own.store_component < 0) {
        own.store_component = new_component("a store of thread " + std::to_string(own.number));
    }
    store.done = {own.store_component, ++own.begun_stores};
    for (uint32_t i = 0; i < store.bytes; i += kChunk) shared.begin_read(store.from + i, own.clock, store.done, what);
    store.block = &block();
    auto const kept = std::make_shared<Store>(std::move(store));
    if (machine.copy_timing == Timing::early) write_global(*kept);
    self().open.push_back(kept);
    machine.stores.push_back(kept);
}

void end_read(Store& store) {
    if (store.waited) return;
    store.waited = true;
    self().clock.learn(store.done);
    read_shared(store);
    for (uint32_t i = 0; i < store.bytes; i += kChunk) block().shared.end_read(store.from + i, "a store");
}

}  // namespace

void store_tensor(void const* map, uint32_t from, int const (&at)[4]) {
    Store store;
    store.box = decoded(map, "store_tensor");
    store.from = from, store.bytes = box_bytes(store.box);
    std::copy(at, at + 4, store.at);
    begin_store(std::move(store), store.box.swizzled ? 1024 : 128, "store_tensor");
}

void reduce_add(float* to, uint32_t from, uint32_t bytes) {
    if (bytes == 0 || bytes % kChunk != 0) fail("reduce_add: %u bytes, which is no multiple of 16", bytes);
    if (reinterpret_cast<uintptr_t>(to) % kChunk != 0) fail("reduce_add: a target that is no multiple of 16");
    Store store;
    store.adds = true, store.to = to, store.from = from, store.bytes = bytes;
    begin_store(std::move(store), kChunk, "reduce_add");
}

void commit_stores() {
    self().stores.emplace_back();
    self().stores.back().swap(self().open);
}

void wait_for_stores(int pending, bool reads_only) {
    auto& groups = self().stores;
    for (int i = 0; i + pending < int(groups.size()); ++i) {
        for (auto const& store : groups[size_t(i)]) {
            end_read(*store);
            if (!reads_only) write_global(*store);
        }
    }
    while (!reads_only && int(groups.size()) > pending) groups.pop_front();
}

void demand_stores(char const* what) {
    if (!self().stores.empty() || !self().open.empty()) fail("%s: stores of this thread are not known to be done", what);
}

bool do_some_store() {
    auto& stores = machine.stores;
    if (stores.empty()) return false;
    write_global(*stores[machine.random() % stores.size()]);
    return true;
}

// When all threads have left.
void finish_stores() {
    for (auto const& store : machine.stores) {
        if (!store->waited) fail("the block ends, and no wait says that a store has read its shared memory");
        write_global(*store);
    }
    machine.stores.clear();
}

// ---- st.shared

void store_chunk(uint32_t to, uint32_t const* registers) {
    Stamp const done = self().clock.now(self().source);
    block().shared.write(to, registers, kChunk, self().clock, done, "st.shared");
}

// ---- stmatrix: lane l holds values 2 (l % 4) and the next of row l / 4 of each matrix

namespace {

struct MatrixCall {
    uint32_t to;
    uint32_t const* registers;
};

}  // namespace

void store_matrix(uint32_t to, uint32_t const* registers, bool transposed) {
    MatrixCall const call = {to, registers};
    together("stmatrix", kAll, &call, [&] {
        uint16_t matrices[4][8][8];
        for (int lane = 0; lane < kWarp; ++lane)
            for (int m = 0; m < 4; ++m)
                for (int i = 0; i < 2; ++i) {
                    auto const value = uint16_t(brought<MatrixCall>(lane).registers[m] >> 16 * i);
                    int const row = lane / 4, column = lane % 4 * 2 + i;
                    matrices[m][transposed ? column : row][transposed ? row : column] = value;
                }
        for (int lane = 0; lane < kWarp; ++lane) {
            uint32_t const address = brought<MatrixCall>(lane).to;
            block().shared.at(address, kChunk, kChunk, "stmatrix");
            int const thread = warp_of(self()) * kWarp + lane;
            auto const& clock = block().fibers[size_t(thread)].clock;
            Stamp const done = clock.now(block().fibers[size_t(thread)].source);
            block().shared.write(address, matrices[lane / 8][lane % 8], kChunk, clock, done, "stmatrix");
        }
    });
}

}  // namespace hopper
