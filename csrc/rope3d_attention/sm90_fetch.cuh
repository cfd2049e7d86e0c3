// What the Hopper kernels have in shared memory, and the warp that fills it.
#pragma once

#include "common/sm90_tensor_copy.cuh"
#include "rope3d_attention/sm90_layout.h"

namespace hunyuan_fast::rope3d_attention {

// One map for each operand, with boxes of 64 features.
struct Maps {
    sm90::TensorMap q;
    sm90::TensorMap k;
    sm90::TensorMap v;
};

#ifdef HUNYUAN_SM90A

// Addresses in shared memory. A full barrier tells consumers that something is there, an empty one the producer that
// it is read, in all blocks of the cluster where all get it. A tail is there when its own barrier says so too.
template <class S>
struct Shared {
    uint32_t base;
    int rank;  // of the block in its cluster

    __device__ uint32_t queries(int buffer) const { return base + buffer * S::kQueryBytes; }
    __device__ uint32_t keys(int stage) const { return base + S::kKeysAt + stage * S::kTileBytes; }
    __device__ uint32_t values(int stage) const { return base + S::kValuesAt + stage * S::kTileBytes; }
    __device__ uint32_t barrier(int i) const { return base + S::kBarriersAt + i * 8; }
    __device__ uint32_t queries_full(int buffer) const { return barrier(buffer); }
    __device__ uint32_t queries_empty(int buffer) const { return barrier(S::kQueryBuffers + buffer); }
    __device__ uint32_t keys_full(int stage) const { return barrier(2 * S::kQueryBuffers + stage); }
    __device__ uint32_t keys_empty(int stage) const { return barrier(2 * S::kQueryBuffers + kStages + stage); }
    __device__ uint32_t values_full(int stage) const { return barrier(2 * S::kQueryBuffers + 2 * kStages + stage); }
    __device__ uint32_t values_empty(int stage) const { return barrier(2 * S::kQueryBuffers + 3 * kStages + stage); }
    __device__ uint32_t key_tail(int stage) const { return barrier(2 * S::kQueryBuffers + 4 * kStages + stage); }
    __device__ uint32_t value_tail(int stage) const { return barrier(2 * S::kQueryBuffers + 5 * kStages + stage); }

    // By one thread, before any other uses them.
    __device__ void init_barriers() const {
        for (int buffer = 0; buffer < S::kQueryBuffers; ++buffer) {
            sm90::init_barrier(queries_full(buffer), S::kRaw ? kPreparers : 1);
            sm90::init_barrier(queries_empty(buffer), kConsumerWarps / kConsumers);  // a lane of each warp
        }
        for (int stage = 0; stage < kStages; ++stage) {
            sm90::init_barrier(keys_full(stage), 1);
            sm90::init_barrier(values_full(stage), 1);
            sm90::init_barrier(keys_empty(stage), S::kCluster * kConsumerWarps);
            sm90::init_barrier(values_empty(stage), S::kCluster * kConsumerWarps);
            sm90::init_barrier(key_tail(stage), 32);  // the lanes of the producer
            sm90::init_barrier(value_tail(stage), 32);
        }
        sm90::fence_async_proxy();  // bulk copies arrive there too
    }

    // By all lanes of a warp that has read a stage.
    __device__ void release(uint32_t empty, int lane) const {
        if constexpr (S::kCluster == 1) {
            if (lane == 0) sm90::arrive(empty);
        } else {
            if (lane < S::kCluster) sm90::arrive_remote(empty, lane);
        }
    }
};

// All blocks that see each other's barriers, or copy to each other's memory.
template <class S>
__device__ void sync_blocks() {
    if constexpr (S::kCluster == 1) {
        __syncthreads();
    } else {
        sm90::sync_cluster();
    }
}

// How far the copies and their readers are, from item to item.
struct Progress {
    sm90::Ring<kStages> keys;
    sm90::Ring<kStages> values;
    uint32_t items = 0;  // how many have had queries
    uint32_t tails = 0;  // a bit for each stage: the parity of how many tails it has held

    __device__ uint32_t tail_phase(int stage) const { return tails >> stage & 1; }
};

__device__ inline TakingPart taking_part(HopperParams const& p, int b) {
    return taking_part(p.lengths, p.queries, b, p.keys, p.L);
}

// Keys or values of which only some are valid. Those past them are zeros: a probability of 0 times what padding holds
// might be NaN. Padding is not read.
template <class T, class S>
__device__ void fetch_tail(uint32_t to, T const* rows, int64_t stride, int valid, int lane, uint32_t barrier) {
    constexpr int kChunks = S::kFeatures / sm90::kChunkElements, kPasses = S::kKeys * kChunks / 32;
    int const chunk = copied_chunk(lane, kChunks);
    uint32_t const block = to + chunk / sm90::kRowChunks * S::kKeyBlockBytes;
#pragma unroll 4
    for (int pass = 0; pass < kPasses; ++pass) {
        int const row = copied_row(lane, pass, kChunks);
        bool const given = row < valid;
        sm90::copy_chunk(block + sm90::chunk_offset(row, chunk % sm90::kRowChunks),
                         rows + (given ? row : 0) * stride + chunk * sm90::kChunkElements,
                         given ? sm90::kChunkBytes : 0u);
    }
    sm90::arrive_after_copies(barrier);
}

// A whole tile, of which each block of the cluster fetches its part for all.
template <class S>
__device__ void fetch_tile(uint32_t to, sm90::TensorMap const& map, int first, Item const& item, int rank,
                           uint32_t barrier) {
    sm90::arrive_expecting(barrier, S::kTileBytes);
#pragma unroll
    for (int block = 0; block < S::kBlocks; ++block) {
        uint32_t const part = to + block * S::kKeyBlockBytes + rank * S::kFetchedBlockBytes;
        int const feature = block * sm90::kRowElements, row = first + rank * S::kFetchedKeys;
        if constexpr (S::kCluster == 1) {
            sm90::copy_tensor(part, map, feature, row, item.n, item.b, barrier);
        } else {
            constexpr uint16_t kAll = (1 << S::kCluster) - 1;
            sm90::copy_tensor_to_cluster(part, map, feature, row, item.n, item.b, barrier, kAll);
        }
    }
}

// The last tile of keys or values of an item, by the whole warp. Every block fetches a tail for itself.
template <class T, class S>
__device__ void fetch_last(uint32_t to, sm90::TensorMap const& map, Rows const& rows, int first, int valid,
                           Item const& item, int rank, int lane, uint32_t full, uint32_t tail) {
    if (valid - first == S::kKeys) {
        if (lane == 0) fetch_tile<S>(to, map, first, item, rank, full);
        return;
    }
    if (lane == 0) sm90::arrive(full);
    auto const* const from = static_cast<T const*>(rows.data) + item.b * rows.stride_b + item.n * rows.stride_n;
    fetch_tail<T, S>(to, from + first * rows.stride_l, rows.stride_l, valid - first, lane, tail);
}

template <class S>
__device__ void fetch_queries(Shared<S> const& shared, sm90::TensorMap const& map, Item const& item,
                              uint32_t parity) {
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
        sm90::wait(shared.queries_empty(consumer), parity ^ 1);
        uint32_t const full = shared.queries_full(consumer);
        sm90::arrive_expecting(full, S::kQueryBytes);
        for (int block = 0; block < S::kBlocks; ++block) {
            sm90::copy_tensor(shared.queries(consumer) + block * S::kQueryBlockBytes, map, block * sm90::kRowElements,
                              first_query(item, shared.rank, consumer), item.n, item.b, full);
        }
    }
}

// Before lane 0 goes on to what ends this phase and may end the next: a lane that lagged so far would wait for ever.
__device__ inline void wait_together(uint32_t barrier, uint32_t parity) {
    sm90::wait(barrier, parity);
    __syncwarp();
}

// Everything that an item reads, by one warp.
template <class T, class S>
__device__ void fetch_item(HopperParams const& p, Maps const& maps, Shared<S> const& shared, Item const& item,
                           int valid, int lane, Progress& progress) {
    int const tiles = ceil_div(valid, S::kKeys), last = (tiles - 1) * S::kKeys;
    sm90::Ring<kStages>&keys = progress.keys, &values = progress.values;
    // keys first: their stage is free before the queries of the item before are
    wait_together(shared.keys_empty(keys.stage), keys.phase ^ 1);
    fetch_last<T, S>(shared.keys(keys.stage), maps.k, p.k, last, valid, item, shared.rank, lane, shared.keys_full(keys.stage),
                     shared.key_tail(keys.stage));
    if constexpr (!S::kRaw) {
        if (lane == 0) fetch_queries(shared, maps.q, item, progress.items & 1);
        __syncwarp();
    }
    wait_together(shared.values_empty(values.stage), values.phase ^ 1);
    fetch_last<T, S>(shared.values(values.stage), maps.v, p.v, last, valid, item, shared.rank, lane,
                     shared.values_full(values.stage), shared.value_tail(values.stage));
    keys.advance(), values.advance(), ++progress.items;
#pragma unroll 1
    for (int step = 1; step < tiles; ++step, keys.advance(), values.advance()) {
        int const first = first_key(step, tiles, S::kKeys);
        wait_together(shared.keys_empty(keys.stage), keys.phase ^ 1);
        if (lane == 0) {
            fetch_tile<S>(shared.keys(keys.stage), maps.k, first, item, shared.rank, shared.keys_full(keys.stage));
        }
        wait_together(shared.values_empty(values.stage), values.phase ^ 1);
        if (lane == 0) {
            fetch_tile<S>(shared.values(values.stage), maps.v, first, item, shared.rank,
                          shared.values_full(values.stage));
        }
    }
}

#endif  // HUNYUAN_SM90A

}  // namespace hunyuan_fast::rope3d_attention
