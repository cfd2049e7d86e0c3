// All index arithmetic of the Hopper kernel, as functions of numbers: host tests run the same.
//
// A thread block takes 128 query rows of one head, 64 for each of two consumer warpgroups, and goes through the keys in
// tiles of 128. Warpgroup 0 fetches. A row of an operand tile is 128 codes: the features of a token, or, of values, the
// tokens of a feature. So both products are of K-major operands, as those of eight bits must be.
#pragma once

#include "common/sm90_layout.h"
#include "fp8_attention/sm90.h"

namespace hunyuan_fast::fp8_attention {

constexpr int kThreads = 3 * sm90::kWarpgroup;
constexpr int kConsumers = 2;
constexpr int kConsumerWarps = kConsumers * sm90::kWarpgroup / 32;
constexpr int kFeatures = 128;
constexpr int kKeys = 128;  // of a tile: those that share a scale
constexpr int kQueryRows = kConsumers * sm90::kBlockRows;
constexpr int kStages = 4;
constexpr int kCodeDepth = 32;  // of one instruction: the K of m64nNk32

// Shared memory from a multiple of 1024 bytes on: the queries of each consumer, stages of keys, stages of values,
// barriers.
constexpr uint32_t kQueryBytes = sm90::kBlockRows * sm90::kRowBytes;
constexpr uint32_t kTileBytes = kKeys * sm90::kRowBytes;
static_assert(kFeatures == kKeys && kFeatures == sm90::kRowBytes);
constexpr uint32_t kKeysAt = kConsumers * kQueryBytes;
constexpr uint32_t kValuesAt = kKeysAt + kStages * kTileBytes;
constexpr uint32_t kBarriersAt = kValuesAt + kStages * kTileBytes;
constexpr int kBarriers = 2 * kConsumers + 4 * kStages;
constexpr uint32_t kAllocated = kBarriersAt + kBarriers * 8 + sm90::kAtomBytes;  // for the alignment
static_assert(kAllocated <= sm90::kSharedBytes);

HUNYUAN_HOST_DEVICE constexpr int ceil_div(int n, int by) { return n / by + (n % by != 0); }

// 128 query rows of one head. All rows of a head before the next: the thread blocks go through its keys and values
// together, so that the second-level cache has what one of them fetched for the others.
struct Item {
    int b = 0;
    int n = 0;
    int first_row = 0;
};

HUNYUAN_HOST_DEVICE constexpr int64_t items_of(HopperParams const& p) {
    return int64_t(p.B) * p.N * ceil_div(p.L, kQueryRows);
}

HUNYUAN_HOST_DEVICE constexpr Item item_of(HopperParams const& p, uint32_t index) {
    uint32_t const per_head = uint32_t(ceil_div(p.L, kQueryRows)), head = index / per_head;
    return {int(head / uint32_t(p.N)), int(head % uint32_t(p.N)), int(index % per_head) * kQueryRows};
}

HUNYUAN_HOST_DEVICE constexpr int64_t head_of(HopperParams const& p, Item const& item) {
    return int64_t(item.b) * p.N + item.n;
}

// The last tile comes first: it alone may be part padding.
HUNYUAN_HOST_DEVICE constexpr int tile_of(int step, int tiles) { return step == 0 ? tiles - 1 : step - 1; }

// Of a thread's scores, the one whose code is byte i of register r of the operand for 32 tokens from 32 k on. Positions
// were given to tokens such that it is a score of the same thread.
HUNYUAN_HOST_DEVICE constexpr int coded_score(int k, int r, int i) {
    return 16 * k + 8 * (r / 2) + 4 * (i / 2) + 2 * (r % 2) + i % 2;
}

}  // namespace hunyuan_fast::fp8_attention
