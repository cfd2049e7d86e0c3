// Where Hopper's matrix instructions find and leave their numbers, as functions that host tests can call too.
// Sections are those of the PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix Instructions".
//
// An operand tile is rows of 64 16-bit values, 128 bytes: "K-major" with "128-Byte swizzling". Eight rows are an atom
// of 1024 bytes, and in row r of it the 16-byte chunk c lies where chunk c ^ r would. Tiles begin at multiples of 1024.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HUNYUAN_HOST_DEVICE __host__ __device__
#else
#define HUNYUAN_HOST_DEVICE
#endif

namespace hunyuan_fast::sm90 {

constexpr int kWarpgroup = 128;       // threads
constexpr int kRowBytes = 128;        // of an operand tile
constexpr int kRowElements = 64;      // 16-bit values
constexpr int kChunkBytes = 16;       // what one copy moves, and what is swizzled
constexpr int kChunkElements = 8;
constexpr int kRowChunks = kRowBytes / kChunkBytes;
constexpr int kAtomBytes = 8 * kRowBytes;
constexpr int kDepth = 16;            // of one instruction: the K of m64nNk16
constexpr int kBlockRows = 64;        // its M
constexpr int kSharedBytes = 227 * 1024;  // of a thread block, at most

// "Strides", swizzling: bits 4 to 6 of an address are those of the chunk, bits 7 to 9 those of the row in its atom.
HUNYUAN_HOST_DEVICE constexpr uint32_t swizzled(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

// Where a chunk of a row is, from the start of its tile.
HUNYUAN_HOST_DEVICE constexpr uint32_t chunk_offset(int row, int chunk) {
    return swizzled(uint32_t(row * kRowBytes + chunk * kChunkBytes));
}

// "Matrix Descriptor Format": addresses and strides in units of 16 bytes; start in bits 0 to 13, leading dimension
// (not used for swizzled K-major tiles, 1 by convention) in 16 to 29, stride from atom to atom in 32 to 45, base offset
// 0 as atoms are aligned, 1 in bits 62 and 63 for 128-byte swizzling.
HUNYUAN_HOST_DEVICE constexpr uint64_t descriptor(uint32_t shared_address) {
    return uint64_t((shared_address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(kAtomBytes >> 4) << 32 |
           uint64_t(1) << 62;
}

// What to add to a descriptor for the columns from 16 k on: 32 k bytes, within the row.
HUNYUAN_HOST_DEVICE constexpr uint64_t descriptor_step(int k) { return uint64_t(k) * (kDepth * 2 >> 4); }

// The other way to lie: "MN-major" tiles are rows of 64 16-bit values too, but a row is 64 neighbours along M (or N)
// at one k. Blocks of 64 along M (or N), each with all its rows below each other, are `block_bytes` apart, a multiple
// of 1024. So what is a K-major tile of one product is an MN-major one of its transpose, without a move.
HUNYUAN_HOST_DEVICE constexpr uint32_t mn_offset(int mn, int k, uint32_t block_bytes) {
    return uint32_t(mn / kRowElements) * block_bytes + swizzled(uint32_t(k * kRowBytes + mn % kRowElements * 2));
}

// "Strides": here the leading dimension goes from 64 to 64 along M (or N), the stride from 8 to 8 along K.
HUNYUAN_HOST_DEVICE constexpr uint64_t descriptor_mn(uint32_t shared_address, uint32_t block_bytes) {
    return uint64_t((shared_address & 0x3ffff) >> 4) | uint64_t(block_bytes >> 4 & 0x3fff) << 16 |
           uint64_t(kAtomBytes >> 4) << 32 | uint64_t(1) << 62;
}

// What to add to it for the rows from 16 k on.
HUNYUAN_HOST_DEVICE constexpr uint64_t descriptor_step_mn(int k) { return uint64_t(k) * (kDepth * kRowBytes >> 4); }

// Along what the values of an operand are neighbours.
enum class Major { K, MN };

// "Register Fragments and Shared Memory Matrix Layouts", accumulator D of m64nNk16: the row and column that register i
// of a thread of the warpgroup holds.
HUNYUAN_HOST_DEVICE constexpr int accumulator_row(int thread, int i) {
    return 16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2 % 2);
}
HUNYUAN_HOST_DEVICE constexpr int accumulator_column(int thread, int i) { return 8 * (i / 4) + 2 * (thread % 4) + i % 2; }

// Operand A of m64nNk16 from registers: register i of a thread holds two values, of this row and of this column and the
// next. So columns 16 k to 16 k + 15 of a product feed the next one without a move: register i is sums 8 k + 2 i and
// 8 k + 2 i + 1.
HUNYUAN_HOST_DEVICE constexpr int fragment_row(int thread, int i) { return accumulator_row(thread, 2 * i); }
HUNYUAN_HOST_DEVICE constexpr int fragment_column(int thread, int i) { return accumulator_column(thread, 2 * i); }

// A place in a ring of buffers, and which time round it is: the parity that mbarrier waits ask for.
template <int Stages>
struct Ring {
    int stage = 0;
    uint32_t phase = 0;

    HUNYUAN_HOST_DEVICE constexpr void advance() {
        if (++stage == Stages) stage = 0, phase ^= 1;
    }
};

}  // namespace hunyuan_fast::sm90
