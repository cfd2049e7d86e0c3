#include "machine/shared.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "machine/machine.h"

namespace hopper {
namespace {

constexpr int kUnwritten = 0xff;  // two of them are a NaN, four too
constexpr uint32_t kAlignment = 1024;

unsigned whole(unsigned bytes, unsigned multiple) { return (bytes + multiple - 1) / multiple * multiple; }

}  // namespace

Shared::Shared(unsigned bytes, int threads)
    : size_(bytes), known_(whole(bytes, kChunk)), chunks_(whole(bytes, kChunk) / kChunk), fences_(threads) {
    auto const page = unsigned(sysconf(_SC_PAGESIZE));
    unsigned const room = whole(whole(bytes, kAlignment), page);
    region_bytes_ = room + 2 * page;
    void* const mapped = mmap(nullptr, region_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) fail("no memory for the shared memory of a block");
    region_ = static_cast<char*>(mapped);
    mprotect(region_ + page, room, PROT_READ | PROT_WRITE);
    std::memset(region_ + page, kUnwritten, room);
    std::memset(known_.data(), kUnwritten, known_.size());
    data_ = region_ + page + room - whole(bytes, kAlignment);
}

Shared::~Shared() {
    if (region_ != nullptr) munmap(region_, region_bytes_);
}

bool Shared::intact() const {
    auto const page = unsigned(sysconf(_SC_PAGESIZE));
    char const *begin = region_ + page, *end = region_ + region_bytes_ - page;
    for (char const* p = begin; p < end; ++p) {
        if (p == data_) p += size_;
        if (p < end && *p != char(kUnwritten)) return false;
    }
    return true;
}

char* Shared::at(uint32_t address, uint32_t bytes, uint32_t multiple, char const* what) const {
    if (address < kSharedBase || uint64_t(address) + bytes > uint64_t(kSharedBase) + size_) {
        fail("%s: bytes %+lld to %+lld of shared memory, which has %u", what, (long long)address - kSharedBase,
             (long long)address - kSharedBase + bytes, size_);
    }
    if (address % multiple != 0) {
        fail("%s: byte %u of shared memory is not a multiple of %u", what, address - kSharedBase, multiple);
    }
    return data_ + (address - kSharedBase);
}

uint32_t Shared::address_of(void const* pointer) const {
    auto const offset = static_cast<char const*>(pointer) - data_;
    if (offset < 0 || offset > int64_t(size_)) fail("an address in shared memory was asked of another pointer");
    return kSharedBase + uint32_t(offset);
}

void Shared::check_unread(uint32_t address, uint32_t bytes, char const* what) const {
    for (uint32_t at = address / kChunk * kChunk; at < address + bytes; at += kChunk) {
        Chunk const& c = chunk(at);
        if (c.barrier) fail("%s: a barrier lies at byte %u of shared memory", what, at - kSharedBase);
        if (c.readers) {
            fail("%s: byte %u of shared memory is written while something asynchronous (a product without its wait, "
                 "a store) still reads it", what, at - kSharedBase);
        }
        if (c.copies) {
            fail("%s: byte %u of shared memory is written while a copy is under way to it", what, at - kSharedBase);
        }
    }
}

void Shared::write(uint32_t address, void const* from, uint32_t bytes, int thread, char const* what) {
    char* const to = at(address, bytes, 1, what);
    check_unread(address, bytes, what);
    std::memcpy(to, from, bytes);
    std::memcpy(&known_[address - kSharedBase], from, bytes);
    ++clock_;
    for (uint32_t a = address / kChunk * kChunk; a < address + bytes; a += kChunk) {
        chunk(a).written = clock_, chunk(a).writer = thread;
    }
}

void Shared::fence(int thread) {
    constexpr unsigned kStep = 4096;
    for (unsigned at = 0; at < size_; at += kStep) {
        unsigned const bytes = size_ - at < kStep ? size_ - at : kStep;
        if (std::memcmp(data_ + at, &known_[at], bytes) == 0) continue;
        for (unsigned i = at; i < at + bytes; i += kChunk) {
            unsigned const some = size_ - i < kChunk ? size_ - i : kChunk;
            if (std::memcmp(data_ + i, &known_[i], some) == 0) continue;
            check_unread(kSharedBase + i, some, "a plain store");
            std::memcpy(&known_[i], data_ + i, some);
            chunk(kSharedBase + i).written = 0;
        }
    }
    fences_[thread] = ++clock_;
}

void Shared::check_traces(uint32_t address, char const* what) const {
    uint32_t const at = address - kSharedBase;
    if (std::memcmp(data_ + at, &known_[at], kChunk) != 0) {
        fail("%s: byte %u of shared memory was written by plain stores, and no fence_async_proxy followed them", what,
             at);
    }
}

void Shared::check_fenced(uint32_t address, int first, int readers, char const* what) const {
    Chunk const& c = chunk(address);
    if (c.written == 0 || fences_[c.writer] > c.written) return;
    for (int i = first; i < first + readers; ++i) {
        if (fences_[i] > c.written) continue;
        fail("%s: byte %u of shared memory was written by thread %d, and neither that one nor thread %d, which asks for "
             "this, has called fence_async_proxy since", what, address - kSharedBase, c.writer, i);
    }
}

void Shared::begin_read(uint32_t address, int first, int readers, char const* what) {
    at(address, kChunk, kChunk, what);
    Chunk& c = chunk(address);
    if (c.barrier) fail("%s: a barrier lies at byte %u of shared memory", what, address - kSharedBase);
    if (c.copies) {
        fail("%s: a copy is still under way to byte %u of shared memory", what, address - kSharedBase);
    }
    check_traces(address, what);
    check_fenced(address, first, readers, what);
    ++c.readers;
}

void Shared::end_read(uint32_t address, char const* what) {
    uint32_t const at = address - kSharedBase;
    if (std::memcmp(data_ + at, &known_[at], kChunk) != 0) {
        fail("%s: byte %u of shared memory was written by a plain store before the wait for what reads it", what, at);
    }
    --chunk(address).readers;
}

void Shared::begin_copy(uint32_t address, uint32_t bytes, int thread, bool generic, char const* what) {
    char* const to = at(address, bytes, kChunk, what);
    check_unread(address, bytes, what);
    for (uint32_t a = address; a < address + bytes; a += kChunk) {
        if (!generic) check_traces(a, what), check_fenced(a, thread, 1, what);
        ++chunk(a).copies;
    }
    std::memset(to, kUnwritten, bytes);
    std::memset(&known_[address - kSharedBase], kUnwritten, bytes);
}

void Shared::land(uint32_t address, void const* from, uint32_t bytes, int thread, bool generic) {
    uint32_t const start = address - kSharedBase;
    for (uint32_t i = 0; i < bytes; ++i) {
        if (data_[start + i] != char(kUnwritten)) {
            fail("byte %u of shared memory was written while a copy was under way to it", start + i);
        }
    }
    std::memcpy(data_ + start, from, bytes);
    std::memcpy(&known_[start], from, bytes);
    ++clock_;
    for (uint32_t a = address; a < address + bytes; a += kChunk) {
        Chunk& c = chunk(a);
        --c.copies;
        c.written = generic ? clock_ : 0, c.writer = thread;
    }
}

void Shared::reserve(uint32_t address, int thread) {
    at(address, 8, 8, "init_barrier");
    Chunk& c = chunk(address);
    if (c.readers || c.copies) fail("init_barrier: byte %u is read or written by others", address - kSharedBase);
    c.barrier = true, c.written = ++clock_, c.writer = thread;
}

}  // namespace hopper
