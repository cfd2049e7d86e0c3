#include "machine/shared.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "machine/block.h"

namespace hopper {
namespace {

constexpr int kUnwritten = 0xff;  // two of them are a NaN, four too
constexpr uint32_t kAlignment = 1024;

unsigned whole(unsigned bytes, unsigned multiple) { return (bytes + multiple - 1) / multiple * multiple; }

}  // namespace

Shared::Shared(unsigned bytes)
    : size_(bytes), known_(whole(bytes, kChunk)), chunks_(whole(bytes, kChunk) / kChunk) {
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

// Plain stores leave traces: bytes that nothing else accounts for.
bool Shared::differs(uint32_t address) const {
    uint32_t const at = address - kSharedBase;
    return std::memcmp(data_ + at, &known_[at], size_ - at < kChunk ? size_ - at : kChunk) != 0;
}

void Shared::check_traces(uint32_t address, char const* what) const {
    if (!differs(address)) return;
    fail("%s: byte %u of shared memory was written by plain stores, and no fence_async_proxy followed them", what,
         address - kSharedBase);
}

// That who asks knows of the last write, and that it was fenced where it must have been.
void Shared::check_written(uint32_t address, Clock const& by, bool generic, char const* what) const {
    Chunk const& c = chunk(address);
    if (c.copies) fail("%s: a copy is still under way to byte %u of shared memory", what, address - kSharedBase);
    if (!by.knows(c.written)) {
        fail("%s: a race at byte %u of shared memory, written by %s: no wait or barrier says that it is done", what,
             address - kSharedBase, source_of(c.written).c_str());
    }
    if (generic || !c.generic || by.knows_fenced(c.written)) return;
    fail("%s: byte %u of shared memory was written by %s through the generic proxy, and no fence_async_proxy lies on "
         "the way from there", what, address - kSharedBase, source_of(c.written).c_str());
}

void Shared::check_write(uint32_t address, Clock const& by, bool generic, char const* what) const {
    Chunk const& c = chunk(address);
    if (c.barrier) fail("%s: a barrier lies at byte %u of shared memory", what, address - kSharedBase);
    check_written(address, by, generic, what);
    for (auto const& read : c.reads) {
        if (by.knows(read)) continue;
        fail("%s: a race at byte %u of shared memory, which %s reads: no wait or barrier says that it has", what,
             address - kSharedBase, source_of(read).c_str());
    }
}

void Shared::write(uint32_t address, void const* from, uint32_t bytes, Clock const& by, Stamp done, char const* what) {
    char* const to = at(address, bytes, kChunk, what);
    for (uint32_t a = address; a < address + bytes; a += kChunk) {
        check_write(a, by, true, what);
        Chunk& c = chunk(a);
        c.written = done, c.generic = true;
        c.reads.clear();
    }
    std::memcpy(to, from, bytes);
    std::memcpy(&known_[address - kSharedBase], from, bytes);
}

void Shared::fence() {
    constexpr unsigned kStep = 4096;
    for (unsigned at = 0; at < size_; at += kStep) {
        unsigned const bytes = size_ - at < kStep ? size_ - at : kStep;
        if (std::memcmp(data_ + at, &known_[at], bytes) == 0) continue;
        for (unsigned i = at; i < at + bytes; i += kChunk) {
            if (!differs(kSharedBase + i)) continue;
            Chunk& c = chunk(kSharedBase + i);
            if (c.readers > 0 || c.copies > 0) {
                fail("byte %u of shared memory was written by a plain store while something asynchronous (a product, a "
                     "store, a copy) is not yet done with it", i);
            }
            std::memcpy(&known_[i], data_ + i, size_ - i < kChunk ? size_ - i : kChunk);
            // whose store it was is not known
            c.written = {}, c.generic = true;
            c.reads.clear();
        }
    }
}

void Shared::begin_read(uint32_t address, Clock const& by, Stamp done, char const* what) {
    at(address, kChunk, kChunk, what);
    Chunk& c = chunk(address);
    if (c.barrier) fail("%s: a barrier lies at byte %u of shared memory", what, address - kSharedBase);
    check_written(address, by, false, what);
    check_traces(address, what);
    ++c.readers;
    for (auto& read : c.reads) {
        if (read.component == done.component) return void(read = done);
    }
    c.reads.push_back(done);
}

void Shared::end_read(uint32_t address, char const* what) {
    if (differs(address)) {
        fail("%s: byte %u of shared memory was written by a plain store before the wait for what reads it", what,
             address - kSharedBase);
    }
    --chunk(address).readers;
}

void Shared::begin_copy(uint32_t address, uint32_t bytes, Clock const& by, bool generic, char const* what) {
    char* const to = at(address, bytes, kChunk, what);
    for (uint32_t a = address; a < address + bytes; a += kChunk) {
        check_write(a, by, generic, what);
        if (!generic) check_traces(a, what);
        Chunk& c = chunk(a);
        ++c.copies;
        c.reads.clear();
    }
    std::memset(to, kUnwritten, bytes);
    std::memset(&known_[address - kSharedBase], kUnwritten, bytes);
}

void Shared::land(uint32_t address, void const* from, uint32_t bytes, Stamp done, bool generic) {
    uint32_t const start = address - kSharedBase;
    for (uint32_t i = 0; i < bytes; ++i) {
        if (data_[start + i] != char(kUnwritten)) {
            fail("byte %u of shared memory was written while a copy was under way to it", start + i);
        }
    }
    std::memcpy(data_ + start, from, bytes);
    std::memcpy(&known_[start], from, bytes);
    for (uint32_t a = address; a < address + bytes; a += kChunk) {
        Chunk& c = chunk(a);
        --c.copies;
        c.written = done, c.generic = generic;
    }
}

void Shared::reserve(uint32_t address, Clock const& by, Stamp done) {
    at(address, 8, 8, "init_barrier");
    Chunk& c = chunk(address);
    check_written(address, by, true, "init_barrier");
    c.barrier = true, c.generic = true, c.written = done;
}

void Shared::check_barrier(uint32_t address, Clock const& by, bool generic, char const* what) const {
    check_written(address, by, generic, what);
}

}  // namespace hopper
