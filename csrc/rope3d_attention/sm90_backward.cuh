// The gradients of attention on Hopper. A block has 128 keys of one head, 64 for each of two consumer warpgroups, and
// goes through all queries, 80 at a time (128 where a row has 64 features). dk and dv stay in registers:
//
//     S^T = k q^T, dP^T = v dout^T       dv += P^T dout, dk += dS^T q       dq^T = k^T dS^T
//
// P^T and dS^T are sums of the first two products and operands in registers of the next two; only dS goes through
// shared memory, for dq needs it of both consumers. A consumer multiplies dS of the step before, which the other one
// has long written, so that neither waits for the other: while one of them exponentiates, the tensor cores have the
// other's products.
//
// dq is a sum over all blocks of a head. Shares could go to memory by atomics, in any order, or a second kernel could
// make dq alone: 7 products instead of 5 per score. Here shares are added up in the second-level cache by the copy
// engine, in the order of the keys, which makes them the same bits always. 4 bytes for each query, feature and 128
// keys: at 119,056 tokens 57 GB for a head, and at 600 TFLOP/s 1.9 TB/s, beside as much again of q and dout. The order
// costs next to nothing: a tile of dq has a counter, the turn, and a block goes through the queries some steps behind
// the block of the keys before. Once this distance is there nobody waits, and a block that begins where another one
// has ended finds it.
//
// By arithmetic alone a step of 128 x 80 scores and 128 features takes 3200 clocks of the tensor cores, 640 of the
// exponentials' unit, and moves 436 KB through shared memory, 3488 clocks at 128 bytes: 144 KB for S and dP, 80 KB for
// dk and dv, 72 KB for dq, 20 KB of dS written, 80 KB of dq through its buffer, 40 KB of q and dout. More queries or
// keys to a step would move less, but there are no registers for them: 128 of a consumer's 240 are dk and dv, 80 P and
// dP, or dq and operands.
#pragma once

#include "common/sm90_launch.cuh"
#include "common/sm90_products.cuh"
#include "rope3d_attention/sm90_backward_edges.cuh"
#include "rope3d_attention/sm90_backward_movers.cuh"

namespace hunyuan_fast::rope3d_attention {

// Registers of a thread after the roles part: 3 x 128 x 168 in all before.
constexpr int kBackwardProducerRegisters = 24;
constexpr int kBackwardConsumerRegisters = 240;

#ifdef HUNYUAN_SM90A

// 64 keys of the block: their gradients stay in registers.
template <class T, int Features>
struct BackwardConsumer {
    using Tile = BackwardTile<Features>;
    static constexpr int kQueries = Tile::kQueries;
    static constexpr int kFragments = kQueries / sm90::kDepth;
    // Exponentials are made beside the products of dP. 64 x 128 scores are too many for the registers that this takes.
    static constexpr bool kBeside = Features == 128;

    BackwardBlock<Features> const& block;
    BackwardParams const& p;
    int const consumer;
    int const thread = threadIdx.x % sm90::kWarpgroup;
    int const warp = thread / 32;
    int const lane = thread % 32;
    int const keys = block.valid - block.first_key() - consumer * sm90::kBlockRows;  // of its 64 at least

    __device__ void arrive(uint32_t barrier) const {
        __syncwarp();
        if (lane == 0) sm90::arrive(barrier);
    }

    // d = rows of this consumer from a tile of keys or values, times all rows of a tile of queries or dout
    __device__ void multiply_rows(float (&d)[kQueries / 2], uint32_t keys, uint32_t queries) const {
        uint64_t const a = sm90::descriptor(keys + consumer * sm90::kBlockRows * sm90::kRowBytes);
        uint64_t const b = sm90::descriptor(queries);
        sm90::fence_products();
#pragma unroll
        for (int k = 0; k < Features / sm90::kDepth; ++k) {
            int const at = k / 4, step = k % 4;
            sm90::multiply<T, kQueries>(d, a + (at * Tile::kKeyBlock >> 4) + sm90::descriptor_step(step),
                                        b + (at * Tile::kQueryBlock >> 4) + sm90::descriptor_step(step), k > 0);
        }
        sm90::commit_products();
    }

    // d += a b, where b is a tile of queries or dout
    __device__ void accumulate(float (&d)[Features / 2], uint32_t const (&a)[kFragments][4], uint32_t queries,
                               int onto) const {
        uint64_t const b = sm90::descriptor_mn(queries, Tile::kQueryBlock);
        sm90::fence_products();
#pragma unroll
        for (int k = 0; k < kFragments; ++k) {
            sm90::multiply<T, Features, sm90::Major::MN>(d, a[k], b + sm90::descriptor_step_mn(k), onto | k);
        }
        sm90::commit_products();
    }

    // Begins this consumer's part of dq^T = k^T dS^T, dS of all keys.
    __device__ void begin_shares(float (&d)[Tile::kSumColumns / 2], int tile) const {
        int const stage = stage_of(tile);
        sm90::wait(block.scores_full(stage), phase_of(tile + 1));
        constexpr bool kByFeatures = Features == 128;
        uint64_t const a = sm90::descriptor_mn(block.keys() + (kByFeatures ? consumer * Tile::kKeyBlock : 0), 1024);
        uint32_t const row = kByFeatures ? 0 : consumer * Tile::kSumColumns * sm90::kRowBytes;
        uint64_t const b = sm90::descriptor(block.scores(stage, 0) + row);
        sm90::fence_products();
#pragma unroll
        for (int k = 0; k < kBackwardKeys / sm90::kDepth; ++k) {
            sm90::multiply<T, Tile::kSumColumns, sm90::Major::K, sm90::Major::MN>(
                d, a + sm90::descriptor_step_mn(k), b + (k / 4 * Tile::kQueryBlock >> 4) + sm90::descriptor_step(k % 4),
                k > 0);
        }
        sm90::commit_products();
    }

    // Two neighbouring numbers of queries, for sums 4 j to 4 j + 3.
    __device__ float2 numbers(int at, int stage, int j) const {
        char const* const row = block.memory + at + stage * Tile::kRowNumbers;
        return *reinterpret_cast<float2 const*>(row + 32 * j + 8 * (lane % 4));
    }

    // P from scores.
    __device__ void exponentiate(float (&s)[kQueries / 2], int stage) const {
#pragma unroll
        for (int j = 0; j < kQueries / 8; ++j) {
            float2 const lse = numbers(Tile::kLseAt, stage, j);
#pragma unroll
            for (int i = 4 * j; i < 4 * j + 4; ++i) {
                s[i] = sm90::exp2_approx(fmaf(s[i], p.score_scale, i % 2 ? -lse.y : -lse.x));
            }
        }
    }

    // dS from P and dP.
    __device__ void differentiate(float (&dp)[kQueries / 2], float const (&s)[kQueries / 2], int stage) const {
#pragma unroll
        for (int j = 0; j < kQueries / 8; ++j) {
            float2 const delta = numbers(Tile::kDeltaAt, stage, j);
#pragma unroll
            for (int i = 4 * j; i < 4 * j + 4; ++i) dp[i] = s[i] * (dp[i] - (i % 2 ? delta.y : delta.x));
        }
    }

    __device__ static void round(uint32_t (&to)[kFragments][4], float const (&from)[kQueries / 2]) {
#pragma unroll
        for (int i = 0; i < kFragments * 4; ++i) to[i / 4][i % 4] = sm90::pack<T>(from[2 * i], from[2 * i + 1]);
    }

    // dS of a step to shared memory: rows are queries there. Of keys that are not there it may be anything, and dq must
    // not feel it.
    __device__ void publish(uint32_t const (&scores)[kFragments][4], int tile) const {
        int const row = lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
        uint32_t const to = block.scores(stage_of(tile), consumer) + sm90::chunk_offset(row, chunk);
        sm90::wait(block.scores_free(stage_of(tile)), phase_of(tile + 1) ^ 1);
#pragma unroll
        for (int k = 0; k < kFragments; ++k) {
            uint32_t four[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) four[i] = sm90::fragment_row(thread, i) < keys ? scores[k][i] : 0;
            sm90::store_matrix_transposed(to + k * sm90::kDepth * sm90::kRowBytes, four);
        }
        sm90::fence_async_proxy();
        arrive(block.scores_full(stage_of(tile)));
    }

    // The sums of dq to the thread that adds them.
    __device__ void hand_over(float const (&sums)[Tile::kSumColumns / 2], int tile) const {
        sm90::wait(block.sums_free(consumer), tile % 2 ^ 1);
        auto* const to = reinterpret_cast<float*>(block.memory + Tile::kSumsAt);
#pragma unroll
        for (int quad = 0; quad < Tile::kSumQuads; ++quad) {
            float const* const four = &sums[4 * quad];
            *reinterpret_cast<float4*>(to + backward_sum_at<Features>(consumer, quad, thread)) =
                make_float4(four[0], four[1], four[2], four[3]);
        }
        sm90::fence_async_proxy();
        arrive(block.sums_full(stage_of(tile), consumer));
    }

    // Rows of dk or dv leave by those of this warp in the tile of values.
    __device__ void write(float const (&sums)[Features / 2], Rows const& rows, float scale) const {
        constexpr int kChunks = Features / sm90::kChunkElements;
        int const own = consumer * sm90::kBlockRows + 16 * warp;
        __syncwarp();
#pragma unroll
        for (int k = 0; k < Features / sm90::kDepth; ++k) {
            uint32_t four[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                four[i] = sm90::pack<T>(scale * sums[8 * k + 2 * i], scale * sums[8 * k + 2 * i + 1]);
            }
            int const row = own + lane / 8 % 2 * 8 + lane % 8, chunk = 2 * k + lane / 16;
            sm90::store_matrix(block.values() + chunk / sm90::kRowChunks * Tile::kKeyBlock +
                                   sm90::chunk_offset(row, chunk % sm90::kRowChunks), four);
        }
        __syncwarp();
#pragma unroll
        for (int i = lane; i < 16 * kChunks; i += 32) {
            int const row = own + i / kChunks, chunk = i % kChunks, key = block.first_key() + row;
            auto const* const from = block.memory + Tile::kValuesAt + chunk / sm90::kRowChunks * Tile::kKeyBlock +
                                     sm90::chunk_offset(row, chunk % sm90::kRowChunks);
            if (key < block.valid) {
                *reinterpret_cast<Sixteen*>(chunk_of<T>(rows, block.batch, key, block.head, chunk)) =
                    *reinterpret_cast<Sixteen const*>(from);
            }
        }
    }

    using Scores = float[kQueries / 2];
    using Gradients = float[Features / 2];
    using Shares = float[Tile::kSumColumns / 2];

    __device__ void begin_scores(Scores& s, int tile) const {
        sm90::wait(block.queries_full(stage_of(tile)), phase_of(tile));
        multiply_rows(s, block.keys(), block.queries(stage_of(tile)));
    }

    // With the scores begun: dP, and them or what becomes of them.
    __device__ void finish_scores(Scores& s, Scores& dp, int tile) const {
        sm90::wait(block.dout_full(stage_of(tile)), phase_of(tile));
        multiply_rows(dp, block.values(), block.dout(stage_of(tile)));
        sm90::wait_for_products<1>();
        sm90::settle(s);
        if constexpr (kBeside) exponentiate(s, stage_of(tile));
        sm90::wait_for_products<0>();
        sm90::settle(dp);
    }

    template <bool More>
    __device__ void step(Gradients& dk, Gradients& dv, Scores& s, Scores& dp, int tile) const {
        int const stage = stage_of(tile);
        if constexpr (!kBeside) exponentiate(s, stage);
        differentiate(dp, s, stage);
        uint32_t probabilities[kFragments][4], scores[kFragments][4];
        round(probabilities, s);
        round(scores, dp);
        accumulate(dv, probabilities, block.dout(stage), tile);
        publish(scores, tile);
        accumulate(dk, scores, block.queries(stage), tile);
        Shares dq;
        begin_shares(dq, tile - 1);
        sm90::wait_for_products<1>();
        arrive(block.stage_free(stage));
        Scores next, next_dp;
        if constexpr (More) begin_scores(next, tile + 1);
        sm90::wait_for_products<More ? 1 : 0>();
        sm90::settle(dq);
        arrive(block.scores_free(stage_of(tile - 1)));
        if (tile > 0) hand_over(dq, tile - 1);
        if constexpr (More) {
            finish_scores(next, next_dp, tile + 1);
#pragma unroll
            for (int i = 0; i < kQueries / 2; ++i) s[i] = next[i], dp[i] = next_dp[i];
        }
    }

    __device__ void run() const {
        Gradients dk, dv;
        Scores s, dp;
        int const tiles = block.query_tiles();
        publish({}, -1);
        sm90::wait(block.keys_full(), 0);
        begin_scores(s, 0);
        finish_scores(s, dp, 0);
#pragma unroll 1
        for (int tile = 0; tile + 1 < tiles; ++tile) step<true>(dk, dv, s, dp, tile);
        step<false>(dk, dv, s, dp, tiles - 1);
        Shares dq;
        begin_shares(dq, tiles - 1);
        sm90::wait_for_products<0>();
        sm90::settle(dq), sm90::settle(dk), sm90::settle(dv);
        hand_over(dq, tiles - 1);
        // all of the warpgroup's products of values are over
        sm90::sync_named(1 + consumer, sm90::kWarpgroup);
        write(dv, p.dv, 1.0f);
        write(dk, p.dk, p.scale);
    }
};

#endif  // HUNYUAN_SM90A

template <class T, int Features>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    backward_kernel(__grid_constant__ BackwardParams const p, __grid_constant__ BackwardMaps const maps, int width) {
#ifdef HUNYUAN_SM90A
    using Tile = BackwardTile<Features>;
    char* const allocated = sm90::dynamic_shared();
    uint32_t const start = sm90::shared_address(allocated);
    uint32_t const skipped = (sm90::kAtomBytes - start % sm90::kAtomBytes) % sm90::kAtomBytes;
    BackwardBlock<Features> block{start + skipped, allocated + skipped};
    char* const space = static_cast<char*>(p.workspace);
    int const sequences = p.B * p.N, key_tiles = ceil_div(p.keys, kBackwardKeys);
    auto const w = backward_workspace<Features>(sequences, p.L);
    auto* const ticket = reinterpret_cast<int*>(block.memory + Tile::kTicketAt);
    if (threadIdx.x == 0) {
        *ticket = sm90::take_ticket(reinterpret_cast<int*>(space + w.ticket));
        block.init_barriers();
    }
    __syncthreads();
    BackwardWork const work = backward_work(*ticket, sequences, key_tiles, width);
    block.sequence = work.sequence, block.key_tile = work.key_tile;
    block.batch = work.sequence / p.N, block.head = work.sequence % p.N;
    TakingPart const part = taking_part(p, block.batch);
    block.valid = part.keys, block.queries_of_sample = part.queries;
    if (block.first_key() >= block.valid) return;

    int const role = __shfl_sync(~0u, int(threadIdx.x) / sm90::kWarpgroup, 0);
    if (role == 0) {
        sm90::give_registers<kBackwardProducerRegisters>();
        int const warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0);
        if (threadIdx.x % 32 != 0) return;
        if (warp == 0) {
            BackwardLoader<Features>{block, p, maps, space + w.edges + block.sequence * Tile::kEdgeBytes}.run(space, w);
        } else if (warp <= 2) {
            int64_t const tile = block.sequence * ceil_div(p.L, Tile::kQueries);
            add_shares(block, warp - 1, reinterpret_cast<float*>(space + w.sums) + tile * Tile::kSums,
                       reinterpret_cast<int*>(space + w.turns) + tile);
        }
    } else {
        sm90::take_registers<kBackwardConsumerRegisters>();
        BackwardConsumer<T, Features>{block, p, role - 1}.run();
    }
#else
    __trap();
#endif
}

template <class T>
sm90::TensorMap backward_map(BackwardParams const& p, Rows const& rows, int length, int box_rows) {
    sm90::TensorBox box;
    box.data = rows.data;
    box.element = std::is_same_v<T, __half> ? sm90::Element::f16 : sm90::Element::bf16;
    int64_t const size[4] = {p.D, length, p.N, p.B}, stride[4] = {1, rows.stride_l, rows.stride_n, rows.stride_b};
    int const extent[4] = {sm90::kRowElements, box_rows, 1, 1};
    for (int i = 0; i < 4; ++i) box.size[i] = size[i], box.stride[i] = stride[i], box.box[i] = extent[i];
    return sm90::make_tensor_map(box);
}

template <class T, int Features>
void run_backward_of(BackwardParams const& p, void* stream) {
    using Tile = BackwardTile<Features>;
    constexpr int kRows = Tile::kQueries;
    BackwardMaps const maps{
        backward_map<T>(p, p.q, p.L, kRows), backward_map<T>(p, p.k, p.keys, kBackwardKeys),
        backward_map<T>(p, p.v, p.keys, kBackwardKeys), backward_map<T>(p, p.dout, p.L, kRows)};
    int const query_tiles = ceil_div(p.L, kRows), sequences = p.B * p.N;
    int const blocks = sequences * ceil_div(p.keys, kBackwardKeys);
    int const width = backward_width(sm90::processors(), query_tiles, sequences);
    dim3 const each_tile(query_tiles * sequences);
    sm90::launch(prepare_kernel<T, Features>, each_tile, kEdgeThreads, 0, stream, p);
    sm90::launch(backward_kernel<T, Features>, dim3(blocks), kBackwardThreads, Tile::kAllocated, stream, p, maps,
                 width);
    sm90::launch(finish_kernel<T, Features>, each_tile, kEdgeThreads, kRows * kFinishColumns<Features> * 4, stream, p);
}

template <class T>
void run_backward(BackwardParams const& p, void* stream) {
    p.D == 64 ? run_backward_of<T, 64>(p, stream) : run_backward_of<T, 128>(p, stream);
}

}  // namespace hunyuan_fast::rope3d_attention
