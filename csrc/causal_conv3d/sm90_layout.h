// All index arithmetic of the Hopper kernels, as functions of numbers: host tests run the same.
//
// An implicit matrix product: rows are output positions in their order, columns output channels, the inner dimension
// taps times input channels. A thread block makes tiles of 128 x 256 or 256 x 128, 64 of the inner dimension at a
// time: a step is one tap and 64 channels. Warpgroup 0 fetches, 1 and 2 multiply, one half of the rows each.
#pragma once

#include "causal_conv3d/sm90.h"
#include "common/sm90_layout.h"

namespace hunyuan_fast::causal_conv3d {

constexpr int kThreads = 3 * sm90::kWarpgroup;
constexpr int kConsumers = 2;
constexpr int kStages = 4;
constexpr int kStepChannels = sm90::kRowElements;
constexpr int kTileSums = 128 * 256;
// What a warp sends out at a time, in fp32: 16 rows of 64 columns, in chunks of 16 bytes.
constexpr int kOutRows = 16;
constexpr int kOutColumns = 64;
constexpr int kOutBytes = kOutRows * kOutColumns * 4;
constexpr int kCopiesPerBlock = 8;  // of a thread, for 128 rows

// Shared memory from a multiple of 1024 bytes on: stages of rows, stages of weights, what the eight warps send out,
// and two barriers for each stage.
template <int N>
struct Tile {
    static constexpr int kColumns = N;
    static constexpr int kRows = kTileSums / N;
    static constexpr int kBlocks = kRows / (kConsumers * sm90::kBlockRows);  // of 64 rows, for each consumer
    static constexpr int kRowBlocks = kRows / sm90::kWarpgroup;              // of 128 rows, for the producer
    static constexpr uint32_t kRowsBytes = kRows * sm90::kRowBytes;
    static constexpr uint32_t kWeightBytes = N * sm90::kRowBytes;
    static constexpr uint32_t kWeights = kStages * kRowsBytes;
    static constexpr uint32_t kOut = kWeights + kStages * kWeightBytes;
    static constexpr uint32_t kBarriers = kOut + 8 * kOutBytes;
    static constexpr uint32_t kBytes = kBarriers + 2 * kStages * 8;
    static constexpr uint32_t kAllocated = kBytes + sm90::kAtomBytes;  // for the alignment

    static_assert(kAllocated <= sm90::kSharedBytes);
};

HUNYUAN_HOST_DEVICE constexpr int ceil_div(int n, int by) { return (n + by - 1) / by; }

// The width that leaves fewer columns of the last tile unused; 256 columns reuse the rows more.
HUNYUAN_HOST_DEVICE constexpr int tile_columns(int O) {
    return ceil_div(O, 256) * 256 == ceil_div(O, 128) * 128 ? 256 : 128;
}

HUNYUAN_HOST_DEVICE constexpr int steps_of(int C, Extent kernel) {
    return kernel.t * kernel.h * kernel.w * (C / kStepChannels);
}

// ---- tiles

// Tiles beside each other share rows, neighbours of them most of the rows of their taps: columns come first, and rows
// in the order of positions. So what the blocks read at a time is one run of each map.
struct TilePlace {
    uint32_t first_row = 0;
    int column_tile = 0;
};

HUNYUAN_HOST_DEVICE constexpr TilePlace tile_place(uint32_t tile, uint32_t column_tiles, int rows) {
    return {tile / column_tiles * uint32_t(rows), int(tile % column_tiles)};
}

// ---- rows

struct Place {
    int b = 0;
    int t = 0;
    int h = 0;
    int w = 0;
};

// The output of a row. Rows beyond the last read what it reads, and write nothing.
HUNYUAN_HOST_DEVICE constexpr Place place_of(HopperParams const& p, uint32_t row) {
    uint32_t rest = row < p.positions ? row : p.positions - 1;
    uint32_t const width = uint32_t(p.out.w), height = uint32_t(p.out.h), frames = uint32_t(p.out.t);
    Place place;
    place.w = int(rest % width), rest /= width;
    place.h = int(rest % height), rest /= height;
    place.t = int(rest % frames);
    place.b = int(rest / frames);
    return place;
}

HUNYUAN_HOST_DEVICE constexpr int64_t offset_in(Rows const& map, int b, int t, int h, int w) {
    return b * map.stride_b + t * map.stride_t + h * map.stride_h + w * map.stride_w;
}

struct Source {
    bool past = false;
    int64_t offset = 0;  // in elements
};

HUNYUAN_HOST_DEVICE constexpr int clamped(int n, int size) { return n < 0 ? 0 : n < size ? n : size - 1; }

// Where the channels are that an output meets by a tap.
HUNYUAN_HOST_DEVICE constexpr Source source_of(HopperParams const& p, Place const& o, Extent const& tap) {
    int const h = clamped(o.h * p.stride.h + tap.h - p.origin.h, p.in.h);
    int const w = clamped(o.w * p.stride.w + tap.w - p.origin.w, p.in.w);
    int const t = o.t * p.stride.t + tap.t - p.origin.t;
    if (t < 0 && p.past_frames > 0) {
        int const before = t + p.past_frames;
        return {true, offset_in(p.past, o.b, before < 0 ? 0 : before, h, w)};
    }
    return {false, offset_in(p.x, o.b, t < 0 ? 0 : t, h, w)};
}

// ---- the producer: a lane knows the places of one row in 32 and hands their addresses around, so that eight lanes
// copy one row of a stage, 128 adjacent bytes

// The row of copy i of a lane, within the 32 of its warp, and which chunk of it.
HUNYUAN_HOST_DEVICE constexpr int copied_row(int lane, int i) { return 4 * i + lane / sm90::kRowChunks; }
HUNYUAN_HOST_DEVICE constexpr int copied_chunk(int lane) { return lane % sm90::kRowChunks; }
// The first row of a warp in a block of 128 rows.
HUNYUAN_HOST_DEVICE constexpr int first_copied_row(int block, int warp) { return block * sm90::kWarpgroup + 32 * warp; }
// Where copy i goes, from the start of the stage: two copies make an atom, and only they depend on the lane.
HUNYUAN_HOST_DEVICE constexpr uint32_t copied_offset(int block, int warp, int lane, int i) {
    return uint32_t(first_copied_row(block, warp) * sm90::kRowBytes + i / 2 * sm90::kAtomBytes) +
           sm90::chunk_offset(copied_row(lane, i % 2), copied_chunk(lane));
}

// ---- weights, packed: for each tile of columns and each step the bytes of a stage, zero beyond O

// In elements, from the start.
HUNYUAN_HOST_DEVICE constexpr int64_t packed_stage(int column_tile, int step, int steps, int columns) {
    return (int64_t(column_tile) * steps + step) * columns * sm90::kRowElements;
}

HUNYUAN_HOST_DEVICE constexpr int64_t packed_size(int O, int C, Extent const& kernel) {
    int const columns = tile_columns(O), steps = steps_of(C, kernel);
    return packed_stage(ceil_div(O, columns), 0, steps, columns);
}

// What the n-th chunk of the packed kernel holds: eight channels from `channel` on of tap `tap` of output `output`.
struct PackedChunk {
    int output = 0;
    int channel = 0;
    Extent tap;
};

HUNYUAN_HOST_DEVICE constexpr PackedChunk packed_chunk(int64_t n, int C, Extent const& kernel, int columns) {
    int const in_stage = int(n % (columns * sm90::kRowChunks));
    int64_t const stage = n / (columns * sm90::kRowChunks);
    int const steps = steps_of(C, kernel), step = int(stage % steps);
    int const row = in_stage / sm90::kRowChunks;
    // swizzling is its own inverse
    int const chunk = int(sm90::chunk_offset(row, in_stage % sm90::kRowChunks)) / sm90::kChunkBytes % sm90::kRowChunks;
    int const blocks = C / kStepChannels, tap = step / blocks;
    PackedChunk found;
    found.output = int(stage / steps) * columns + row;
    found.channel = step % blocks * kStepChannels + chunk * sm90::kChunkElements;
    found.tap = {tap / (kernel.h * kernel.w), tap / kernel.w % kernel.h, tap % kernel.w};
    return found;
}

// ---- the consumers

// The first of the 64 rows of a consumer's block.
HUNYUAN_HOST_DEVICE constexpr int block_row(int consumer, int block, int blocks) {
    return (consumer * blocks + block) * sm90::kBlockRows;
}

// Where a warp keeps four sums of a row before they go out, from the start of its own bytes. Rows lie over the same
// banks, so chunks change places: neither writes of pairs nor reads of fours meet in a bank.
HUNYUAN_HOST_DEVICE constexpr uint32_t out_offset(int row, int chunk) {
    return uint32_t(row * kOutColumns * 4 + (chunk ^ 2 * (row & 3) ^ (chunk >> 3 & 1)) * 16);
}

// Eight lanes send one row out, eight columns each, four rows at a time.
HUNYUAN_HOST_DEVICE constexpr int sent_row(int lane, int pass) { return 4 * pass + lane / 8; }
HUNYUAN_HOST_DEVICE constexpr int sent_column(int lane) { return lane % 8 * 8; }

}  // namespace hunyuan_fast::causal_conv3d
