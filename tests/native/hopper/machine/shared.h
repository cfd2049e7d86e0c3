// Shared memory of a block, and what is known of each 16 bytes of it.
#pragma once

#include <cstdint>
#include <vector>

#include "machine/clock.h"

namespace hopper {

constexpr uint32_t kSharedBase = 1024;  // its first address
constexpr uint32_t kChunk = 16;

// 128-byte swizzling: bits 4 to 6 of an address are combined with bits 7 to 9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

class Shared {
public:
    explicit Shared(unsigned bytes);
    ~Shared();
    Shared(Shared const&) = delete;
    Shared& operator=(Shared const&) = delete;

    char* data() const { return data_; }

    // Where an address is; fails where it is not, or not a multiple.
    char* at(uint32_t address, uint32_t bytes, uint32_t multiple, char const* what) const;
    uint32_t address_of(void const* pointer) const;

    // A store of the generic proxy that this machine sees; `by` is the knowledge of its thread, `done` its own event.
    void write(uint32_t address, void const* from, uint32_t bytes, Clock const& by, Stamp done, char const* what);
    // What plain stores have written is known to the asynchronous proxy from here on.
    void fence();

    // The asynchronous proxy reads 16 bytes at some time between these; `done` is what tells of the end.
    void begin_read(uint32_t address, Clock const& by, Stamp done, char const* what);
    void end_read(uint32_t address, char const* what);

    // A copy writes at some time between these, cp.async through the generic proxy.
    void begin_copy(uint32_t address, uint32_t bytes, Clock const& by, bool generic, char const* what);
    void land(uint32_t address, void const* from, uint32_t bytes, Stamp done, bool generic);

    // A barrier lies here: nothing else may.
    void reserve(uint32_t address, Clock const& by, Stamp done);
    // Its beginning is known to who uses it, and to the asynchronous proxy where that does.
    void check_barrier(uint32_t address, Clock const& by, bool generic, char const* what) const;

    // Whether bytes around the allocation are as they were.
    bool intact() const;

private:
    struct Chunk {
        Stamp written;
        bool generic = false;      // it was written through the generic proxy
        bool barrier = false;
        uint16_t readers = 0;      // unfinished, of the asynchronous proxy
        uint16_t copies = 0;       // under way to it
        std::vector<Stamp> reads;  // since it was written
    };

    Chunk& chunk(uint32_t address) { return chunks_[(address - kSharedBase) / kChunk]; }
    Chunk const& chunk(uint32_t address) const { return chunks_[(address - kSharedBase) / kChunk]; }
    void check_write(uint32_t address, Clock const& by, bool generic, char const* what) const;
    void check_written(uint32_t address, Clock const& by, bool generic, char const* what) const;
    void check_traces(uint32_t address, char const* what) const;
    bool differs(uint32_t address) const;

    unsigned size_;
    char* region_ = nullptr;
    uint64_t region_bytes_ = 0;
    char* data_ = nullptr;
    std::vector<char> known_;  // as data_, without what plain stores wrote since a fence
    std::vector<Chunk> chunks_;
};

}  // namespace hopper
