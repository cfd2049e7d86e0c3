// Shared memory of a block, and what is known of each 16 bytes of it.
#pragma once

#include <cstdint>
#include <vector>

namespace hopper {

constexpr uint32_t kSharedBase = 1024;  // its first address
constexpr uint32_t kChunk = 16;

class Shared {
public:
    explicit Shared(unsigned bytes, int threads);
    ~Shared();
    Shared(Shared const&) = delete;
    Shared& operator=(Shared const&) = delete;

    char* data() const { return data_; }
    unsigned size() const { return size_; }

    // Where an address is; fails where it is not, or not a multiple.
    char* at(uint32_t address, uint32_t bytes, uint32_t multiple, char const* what) const;
    uint32_t address_of(void const* pointer) const;

    // Stores of the generic proxy that this machine sees: stmatrix, cp.async.
    void write(uint32_t address, void const* from, uint32_t bytes, int thread, char const* what);

    // This thread's knowledge becomes that of the asynchronous proxy.
    void fence(int thread);

    // The asynchronous proxy reads from `begin_read` on until `end_read`, whenever it likes. `readers` threads from
    // `first` on ask for it.
    void begin_read(uint32_t address, int first, int readers, char const* what);
    void end_read(uint32_t address, char const* what);

    // A copy writes a run of bytes at some time between the two.
    void begin_copy(uint32_t address, uint32_t bytes, int thread, bool generic, char const* what);
    void land(uint32_t address, void const* from, uint32_t bytes, int thread, bool generic);

    // A barrier lies here: nothing else may.
    void reserve(uint32_t address, int thread);
    bool reserved(uint32_t address) const { return chunk(address).barrier; }
    // The asynchronous proxy is to know of a barrier's beginning.
    void check_fenced(uint32_t address, int first, int readers, char const* what) const;

    // Whether bytes around the allocation are as they were.
    bool intact() const;

private:
    struct Chunk {
        uint64_t written = 0;  // when, by a store that may still be unfenced; 0: never
        int writer = 0;
        uint16_t readers = 0;  // unfinished reads of the asynchronous proxy
        uint16_t copies = 0;   // under way to it
        bool barrier = false;
    };

    Chunk& chunk(uint32_t address) { return chunks_[(address - kSharedBase) / kChunk]; }
    Chunk const& chunk(uint32_t address) const { return chunks_[(address - kSharedBase) / kChunk]; }
    void check_unread(uint32_t address, uint32_t bytes, char const* what) const;
    // Fails where plain stores, of which only their traces are seen, were not fenced.
    void check_traces(uint32_t address, char const* what) const;

    unsigned size_;
    char* region_ = nullptr;
    uint64_t region_bytes_ = 0;
    char* data_ = nullptr;
    std::vector<char> known_;  // to the asynchronous proxy
    std::vector<Chunk> chunks_;
    std::vector<uint64_t> fences_;  // the last one of each thread
    uint64_t clock_ = 0;
};

}  // namespace hopper
