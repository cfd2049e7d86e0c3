// What the Hopper kernel has in shared memory, and the thread that fills it.
#pragma once

#include "common/sm90_tensor_copy.cuh"
#include "fp8_attention/sm90_layout.h"

namespace hunyuan_fast::fp8_attention {

struct Maps {
    sm90::TensorMap q;
    sm90::TensorMap k;
    sm90::TensorMap v;
};

#ifdef HUNYUAN_SM90A

// Addresses in shared memory. A full barrier tells consumers that something is there, an empty one the producer that
// it is read.
struct Shared {
    uint32_t base;

    __device__ uint32_t queries(int consumer) const { return base + consumer * kQueryBytes; }
    __device__ uint32_t keys(int stage) const { return base + kKeysAt + stage * kTileBytes; }
    __device__ uint32_t values(int stage) const { return base + kValuesAt + stage * kTileBytes; }
    __device__ uint32_t barrier(int i) const { return base + kBarriersAt + i * 8; }
    __device__ uint32_t queries_full(int consumer) const { return barrier(consumer); }
    __device__ uint32_t queries_empty(int consumer) const { return barrier(kConsumers + consumer); }
    __device__ uint32_t keys_full(int stage) const { return barrier(2 * kConsumers + stage); }
    __device__ uint32_t keys_empty(int stage) const { return barrier(2 * kConsumers + kStages + stage); }
    __device__ uint32_t values_full(int stage) const { return barrier(2 * kConsumers + 2 * kStages + stage); }
    __device__ uint32_t values_empty(int stage) const { return barrier(2 * kConsumers + 3 * kStages + stage); }

    // By one thread, before any other uses them.
    __device__ void init_barriers() const {
        for (int consumer = 0; consumer < kConsumers; ++consumer) {
            sm90::init_barrier(queries_full(consumer), 1);
            sm90::init_barrier(queries_empty(consumer), kConsumerWarps / kConsumers);  // a lane of each warp
        }
        for (int stage = 0; stage < kStages; ++stage) {
            sm90::init_barrier(keys_full(stage), 1);
            sm90::init_barrier(values_full(stage), 1);
            sm90::init_barrier(keys_empty(stage), kConsumerWarps);
            sm90::init_barrier(values_empty(stage), kConsumerWarps);
        }
        sm90::fence_async_proxy();  // bulk copies arrive there too
    }
};

// How far the copies and their readers are, from item to item. Keys and values take turns in rings of one length.
struct Progress {
    sm90::Ring<kStages> keys;
    sm90::Ring<kStages> values;
    uint32_t items = 0;  // how many have had queries
};

__device__ inline int valid_tokens(HopperParams const& p, int b) {
    if (p.lengths == nullptr) return p.L;
    int const length = p.lengths[b * p.lengths_step];
    return length < 0 ? 0 : length < p.L ? length : p.L;
}

__device__ inline void fetch_queries(Shared const& shared, Maps const& maps, Item const& item, uint32_t parity) {
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
        sm90::wait(shared.queries_empty(consumer), parity ^ 1);
        sm90::arrive_expecting(shared.queries_full(consumer), kQueryBytes);
        sm90::copy_tensor(shared.queries(consumer), maps.q, 0, item.first_row + consumer * sm90::kBlockRows, item.n,
                          item.b, shared.queries_full(consumer));
    }
}

// Everything that an item reads, by one thread. Codes have whole tiles: what is past the valid tokens is zeros.
__device__ inline void fetch_item(Maps const& maps, Shared const& shared, Item const& item, int valid,
                                  Progress& progress) {
    int const tiles = ceil_div(valid, kKeys);
    sm90::Ring<kStages>&keys = progress.keys, &values = progress.values;
#pragma unroll 1
    for (int step = 0; step < tiles; ++step, keys.advance(), values.advance()) {
        int const first = tile_of(step, tiles) * kKeys;
        sm90::wait(shared.keys_empty(keys.stage), keys.phase ^ 1);
        sm90::arrive_expecting(shared.keys_full(keys.stage), kTileBytes);
        sm90::copy_tensor(shared.keys(keys.stage), maps.k, 0, first, item.n, item.b, shared.keys_full(keys.stage));
        // after the first keys, whose stage is free before the queries of the item before are
        if (step == 0) fetch_queries(shared, maps, item, progress.items & 1);
        sm90::wait(shared.values_empty(values.stage), values.phase ^ 1);
        sm90::arrive_expecting(shared.values_full(values.stage), kTileBytes);
        sm90::copy_tensor(shared.values(values.stage), maps.v, first, 0, item.n, item.b,
                          shared.values_full(values.stage));
    }
    ++progress.items;
}

#endif  // HUNYUAN_SM90A

}  // namespace hunyuan_fast::fp8_attention
