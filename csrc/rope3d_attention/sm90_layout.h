// All index arithmetic of the Hopper kernels, as functions of numbers: host tests run the same.
//
// A thread block takes 128 query rows of one head, 64 for each of two consumer warpgroups, and goes through the keys in
// tiles. Warpgroup 0 fetches, and prepares queries that come raw. In a cluster of two blocks, neighbours in rows, each
// fetches half of every tile for both.
#pragma once

#include "common/sm90_layout.h"
#include "rope3d_attention/sm90.h"

namespace hunyuan_fast::rope3d_attention {

constexpr int kThreads = 3 * sm90::kWarpgroup;
constexpr int kConsumers = 2;
constexpr int kConsumerWarps = kConsumers * sm90::kWarpgroup / 32;
constexpr int kQueryRows = kConsumers * sm90::kBlockRows;
constexpr int kStages = 2;
constexpr int kPreparers = 3;  // warps

HUNYUAN_HOST_DEVICE constexpr int ceil_div(int n, int by) { return n / by + (n % by != 0); }

// Shared memory from a multiple of 1024 bytes on: the queries of each consumer (and, where they come raw, of one more:
// so those that come next are prepared before the last ones are done with), stages of keys, stages of values,
// barriers. An operand is blocks of 64 features, of a row of 128 bytes for each token.
template <int D, int Keys, int Cluster, bool Raw = false>
struct Shape {
    static_assert(D % sm90::kRowElements == 0 && Keys % sm90::kDepth == 0);
    static constexpr bool kRaw = Raw;
    static constexpr int kQueryBuffers = kConsumers + Raw;
    static constexpr int kCluster = Cluster;
    static constexpr int kFetchedKeys = Keys / Cluster;  // of a tile, by one block
    static constexpr int kFeatures = D;
    static constexpr int kKeys = Keys;
    static constexpr int kBlocks = D / sm90::kRowElements;
    static constexpr uint32_t kQueryBlockBytes = sm90::kBlockRows * sm90::kRowBytes;
    static constexpr uint32_t kKeyBlockBytes = Keys * sm90::kRowBytes;
    static constexpr uint32_t kFetchedBlockBytes = kFetchedKeys * sm90::kRowBytes;
    static constexpr uint32_t kQueryBytes = kBlocks * kQueryBlockBytes;
    static constexpr uint32_t kTileBytes = kBlocks * kKeyBlockBytes;
    static constexpr uint32_t kKeysAt = kQueryBuffers * kQueryBytes;
    static constexpr uint32_t kValuesAt = kKeysAt + kStages * kTileBytes;
    static constexpr uint32_t kBarriersAt = kValuesAt + kStages * kTileBytes;
    static constexpr int kBarriers = 2 * kQueryBuffers + 6 * kStages;
    static constexpr uint32_t kAllocated = kBarriersAt + kBarriers * 8 + sm90::kAtomBytes;  // for the alignment

    static_assert(Keys % Cluster == 0 && kFetchedBlockBytes % sm90::kAtomBytes == 0);
    static_assert(kAllocated <= sm90::kSharedBytes);
};

// ---- which rows take part

// How many queries and keys of a sample: some of both, or none.
struct TakingPart {
    int queries = 0;
    int keys = 0;
};

HUNYUAN_HOST_DEVICE inline int rows_of_sample(Lengths const& lengths, int b, int rows) {
    if (lengths.data == nullptr) return rows;
    int const length = lengths.data[b * lengths.step];
    return length < 0 ? 0 : length < rows ? length : rows;
}

HUNYUAN_HOST_DEVICE inline TakingPart taking_part(Lengths const& of_keys, Lengths const& of_queries, int b, int keys,
                                                  int queries) {
    TakingPart part;
    part.queries = part.keys = rows_of_sample(of_keys, b, keys);
    if (of_queries.data == nullptr) return part;
    part.queries = rows_of_sample(of_queries, b, queries);
    return part.queries == 0 || part.keys == 0 ? TakingPart{} : part;
}

// ---- items: 128 query rows of one head for each block of a cluster

// All heads of a sample one after the other, and of each all query rows before the next: the thread blocks go through
// the keys and values of one head together, so that the second-level cache has what one of them fetched for the others.
struct Item {
    int b = 0;
    int n = 0;
    int first_row = 0;
};

HUNYUAN_HOST_DEVICE constexpr int items_of_head(int L, int cluster) { return ceil_div(L, cluster * kQueryRows); }

HUNYUAN_HOST_DEVICE constexpr int64_t items_of(HopperParams const& p) {
    return int64_t(p.B) * p.N * items_of_head(p.L, p.cluster);
}

HUNYUAN_HOST_DEVICE constexpr Item item_of(HopperParams const& p, uint32_t index, int cluster) {
    uint32_t const per_head = uint32_t(items_of_head(p.L, cluster)), head = index / per_head;
    return {int(head / uint32_t(p.N)), int(head % uint32_t(p.N)), int(index % per_head) * cluster * kQueryRows};
}

HUNYUAN_HOST_DEVICE constexpr int first_query(Item const& item, int rank, int consumer) {
    return item.first_row + rank * kQueryRows + consumer * sm90::kBlockRows;
}

// ---- buffers of queries

struct QueryBuffer {
    int index = 0;
    uint32_t phase = 0;  // the parity of how often it was filled before
};

// Raw queries go from buffer to buffer: those of one consumer, those of the other, those of the next item.
template <class S>
HUNYUAN_HOST_DEVICE constexpr QueryBuffer raw_buffer(uint32_t filled_before) {
    return {int(filled_before % S::kQueryBuffers), filled_before / S::kQueryBuffers & 1};
}

// Of a consumer that has had the queries of so many items before.
template <class S>
HUNYUAN_HOST_DEVICE constexpr QueryBuffer query_buffer(int consumer, uint32_t items) {
    if constexpr (S::kRaw) return raw_buffer<S>(items * kConsumers + uint32_t(consumer));
    return {consumer, items & 1};
}

// ---- tiles of keys

// The last tile comes first: it alone may be part padding.
HUNYUAN_HOST_DEVICE constexpr int first_key(int step, int tiles, int keys) {
    return (step == 0 ? tiles - 1 : step - 1) * keys;
}

// Which chunks of 16 bytes a lane copies of a tile whose rows have so many: neighbours along the row.
HUNYUAN_HOST_DEVICE constexpr int copied_row(int lane, int pass, int chunks) {
    return pass * (32 / chunks) + lane / chunks;
}
HUNYUAN_HOST_DEVICE constexpr int copied_chunk(int lane, int chunks) { return lane % chunks; }

}  // namespace hunyuan_fast::rope3d_attention
