// What moves tiles for the gradients of attention on Hopper: a thread that fetches, and two that add shares of dq to
// global memory.
#pragma once

#include "common/sm90_tensor_copy.cuh"
#include "common/sm90_turns.cuh"
#include "rope3d_attention/sm90_backward.h"

namespace hunyuan_fast::rope3d_attention {

struct BackwardMaps {
    sm90::TensorMap q, k, v, dout;
};

#ifdef HUNYUAN_SM90A

// Addresses in shared memory, and what a block does.
template <int Features>
struct BackwardBlock {
    using Tile = BackwardTile<Features>;

    uint32_t base;
    char* memory;    // the same place
    int batch;
    int head;
    int key_tile;
    int valid;       // keys of the sample
    int queries_of_sample;
    int64_t sequence;

    __device__ int first_key() const { return key_tile * kBackwardKeys; }
    __device__ int query_tiles() const { return ceil_div(queries_of_sample, Tile::kQueries); }

    __device__ uint32_t keys() const { return base + Tile::kKeysAt; }
    __device__ uint32_t values() const { return base + Tile::kValuesAt; }
    __device__ uint32_t queries(int stage) const { return base + Tile::kQueriesAt + stage * Tile::kQueryBytes; }
    __device__ uint32_t dout(int stage) const { return base + Tile::kDoutAt + stage * Tile::kQueryBytes; }
    // dS, of the keys of one consumer
    __device__ uint32_t scores(int stage, int consumer) const {
        return base + Tile::kScoresAt + stage * Tile::kScoreBytes + consumer * Tile::kQueryBlock;
    }
    __device__ uint32_t sums(int consumer) const { return base + Tile::kSumsAt + consumer * Tile::kHalfSums * 4; }
    __device__ uint32_t lse(int stage) const { return base + Tile::kLseAt + stage * Tile::kRowNumbers; }
    __device__ uint32_t delta(int stage) const { return base + Tile::kDeltaAt + stage * Tile::kRowNumbers; }

    __device__ uint32_t barrier(int index) const { return base + Tile::kBarriersAt + index * 8; }
    __device__ uint32_t keys_full() const { return barrier(0); }
    __device__ uint32_t queries_full(int stage) const { return barrier(1 + stage); }
    __device__ uint32_t dout_full(int stage) const { return barrier(3 + stage); }
    __device__ uint32_t stage_free(int stage) const { return barrier(5 + stage); }
    __device__ uint32_t scores_full(int stage) const { return barrier(7 + stage); }
    __device__ uint32_t scores_free(int stage) const { return barrier(9 + stage); }
    __device__ uint32_t sums_full(int stage, int consumer) const { return barrier(11 + 2 * stage + consumer); }
    __device__ uint32_t sums_free(int consumer) const { return barrier(15 + consumer); }

    __device__ void init_barriers() const {
        constexpr int kWarps = kBackwardConsumers * 4;  // a lane of each arrives
        sm90::init_barrier(keys_full(), 1);
        for (int stage = 0; stage < kBackwardStages; ++stage) {
            sm90::init_barrier(queries_full(stage), 1);
            sm90::init_barrier(dout_full(stage), 1);
            sm90::init_barrier(stage_free(stage), kWarps);
            sm90::init_barrier(scores_full(stage), kWarps);
            sm90::init_barrier(scores_free(stage), kWarps);
        }
        for (int consumer = 0; consumer < kBackwardConsumers; ++consumer) {
            for (int stage = 0; stage < kBackwardStages; ++stage) sm90::init_barrier(sums_full(stage, consumer), 4);
            sm90::init_barrier(sums_free(consumer), 1);
        }
        sm90::fence_async_proxy();
    }
};

// One thread brings everything: keys and values once, then query tile after query tile.
template <int Features>
struct BackwardLoader {
    using Tile = BackwardTile<Features>;
    BackwardBlock<Features> const& block;
    BackwardParams const& p;
    BackwardMaps const& maps;
    char const* edge;

    // A tile of `rows` rows, from the tensor or, the last of `valid` ones, from its copy that ends in zeros.
    __device__ void load(uint32_t to, sm90::TensorMap const& map, int first, int rows, int valid, int edge_at,
                         uint32_t barrier) const {
        uint32_t const block_bytes = rows * sm90::kRowBytes;
        if (first + rows > valid) {
            sm90::copy_bulk(to, edge + edge_at, Tile::kBlocks * block_bytes, barrier);
            return;
        }
#pragma unroll
        for (int i = 0; i < Tile::kBlocks; ++i) {
            sm90::copy_tensor(to + i * block_bytes, map, i * sm90::kRowElements, first, block.head, block.batch,
                              barrier);
        }
    }

    __device__ void run(char const* space, BackwardWorkspace const& w) const {
        sm90::arrive_expecting(block.keys_full(), 2 * Tile::kKeyBytes);
        load(block.keys(), maps.k, block.first_key(), kBackwardKeys, block.valid, Tile::kEdgeKeysAt,
             block.keys_full());
        load(block.values(), maps.v, block.first_key(), kBackwardKeys, block.valid, Tile::kEdgeValuesAt,
             block.keys_full());
        int64_t const numbers = block.sequence * ceil_div(p.L, Tile::kQueries) * Tile::kRowNumbers;
        char const *lse = space + w.lse + numbers, *delta = space + w.delta + numbers;
        sm90::Ring<kBackwardStages> ring;
        int const rows = block.query_tiles() * Tile::kQueries;
#pragma unroll 1
        for (int first = 0; first < rows; first += Tile::kQueries) {
            uint32_t const queries = block.queries_full(ring.stage), dout = block.dout_full(ring.stage);
            sm90::wait(block.stage_free(ring.stage), ring.phase ^ 1);
            sm90::arrive_expecting(queries, Tile::kQueryBytes + Tile::kRowNumbers);
            load(block.queries(ring.stage), maps.q, first, Tile::kQueries, block.queries_of_sample,
                 Tile::kEdgeQueriesAt, queries);
            sm90::copy_bulk(block.lse(ring.stage), lse, Tile::kRowNumbers, queries);
            sm90::arrive_expecting(dout, Tile::kQueryBytes + Tile::kRowNumbers);
            load(block.dout(ring.stage), maps.dout, first, Tile::kQueries, block.queries_of_sample,
                 Tile::kEdgeDoutAt, dout);
            sm90::copy_bulk(block.delta(ring.stage), delta, Tile::kRowNumbers, dout);
            lse += Tile::kRowNumbers, delta += Tile::kRowNumbers;
            ring.advance();
        }
    }
};

// Buffers of step `tile`, and which time round it is.
__device__ inline int stage_of(int tile) { return tile & 1; }
__device__ inline uint32_t phase_of(int tile) { return tile >> 1 & 1; }

// A thread adds the block's share of every second tile of dq to the sums in global memory, when it is its turn. Another
// one has the tiles between, so that nobody's share waits until the one before has arrived.
template <int Features>
__device__ void add_shares(BackwardBlock<Features> const& block, int first, float* sums, int* turns) {
    using Tile = BackwardTile<Features>;
    int const tiles = block.query_tiles();
#pragma unroll 1
    for (int tile = first; tile < tiles; tile += 2) {
        sm90::wait_for_turn(turns + tile, block.key_tile);
#pragma unroll 1
        for (int consumer = 0; consumer < kBackwardConsumers; ++consumer) {
            sm90::wait(block.sums_full(stage_of(tile), consumer), phase_of(tile));
            sm90::reduce_add(sums + int64_t(tile) * Tile::kSums + consumer * Tile::kHalfSums, block.sums(consumer),
                             Tile::kHalfSums * 4);
            sm90::commit_stores();
            sm90::wait_for_store_reads<0>();
            sm90::arrive(block.sums_free(consumer));
        }
        sm90::wait_for_stores<0>();
        sm90::pass_turn(turns + tile, block.key_tile + 1);
    }
}

#endif  // HUNYUAN_SM90A

}  // namespace hunyuan_fast::rope3d_attention
