// The Hopper kernel: one warp fetches, two consumer warpgroups multiply and exponentiate. A consumer begins the product
// of its next scores together with that of its last probabilities, and exponentiates the former while the latter is
// under way. Consumers take turns: while one of them exponentiates, the other one's products have the tensor cores.
// Blocks stay and take item after item. Where two of them share a cluster, they take neighbouring rows of a head.
#pragma once

#include <type_traits>

#include "common/sm90_launch.cuh"
#include "common/sm90_products.cuh"
#include "rope3d_attention/sm90_fetch.cuh"
#include "rope3d_attention/sm90_queries.cuh"
#include "rope3d_attention/sm90_softmax.cuh"

namespace hunyuan_fast::rope3d_attention {

// Registers of a thread after the roles part: 3 x 128 x 168 in all before.
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;

#ifdef HUNYUAN_SM90A

constexpr int kFirstTurn = 1;  // named barriers, one for each consumer; 0 is that of __syncthreads

// A consumer begins its turn when the other one has passed it on.
__device__ inline void begin_turn(int consumer) {
    sm90::sync_named(kFirstTurn + consumer, kConsumers * sm90::kWarpgroup);
}
__device__ inline void pass_turn(int consumer) {
    sm90::arrive_named(kFirstTurn + (consumer ^ 1), kConsumers * sm90::kWarpgroup);
}

// scores = queries keys^T
template <class T, class S>
__device__ void multiply_keys(float (&scores)[S::kKeys / 2], uint32_t queries_at, uint32_t keys_at) {
    uint64_t const queries = sm90::descriptor(queries_at), keys = sm90::descriptor(keys_at);
    sm90::fence_products();
#pragma unroll
    for (int k = 0; k < S::kFeatures / sm90::kDepth; ++k) {
        int const block = k / 4;
        uint64_t const step = sm90::descriptor_step(k % 4);
        sm90::multiply<T, S::kKeys>(scores, queries + uint64_t(block * S::kQueryBlockBytes >> 4) + step,
                                    keys + uint64_t(block * S::kKeyBlockBytes >> 4) + step, k > 0);
    }
    sm90::commit_products();
}

// sums += probabilities values
template <class T, class S>
__device__ void multiply_values(float (&sums)[S::kFeatures / 2], uint32_t const (&probabilities)[S::kKeys / 16][4],
                                uint32_t values_at) {
    uint64_t const values = sm90::descriptor_mn(values_at, S::kKeyBlockBytes);
    sm90::fence_products();
#pragma unroll
    for (int k = 0; k < S::kKeys / sm90::kDepth; ++k) {
        sm90::multiply<T, S::kFeatures, sm90::Major::MN>(sums, probabilities[k],
                                                         values + sm90::descriptor_step_mn(k), 1);
    }
    sm90::commit_products();
}

// The accumulator of one product as the operand of the next: its registers, two by two.
template <class T, int Keys>
__device__ void pack_probabilities(float const (&scores)[Keys / 2], uint32_t (&probabilities)[Keys / 16][4]) {
#pragma unroll
    for (int k = 0; k < Keys / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            probabilities[k][i] = sm90::pack<T>(scores[8 * k + 2 * i], scores[8 * k + 2 * i + 1]);
        }
    }
}

template <int Count>
__device__ void rescale(float (&sums)[Count], float const (&by)[2]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) sums[i] *= by[row_of_sum(i)];
}

// Sums, not yet divided by the totals, of one consumer's rows of an item.
template <class T, class S>
__device__ void attend(HopperParams const& p, Shared<S> const& shared, int consumer, int valid,
                       float (&sums)[S::kFeatures / 2], Online& online, Progress& progress) {
    int const thread = threadIdx.x % sm90::kWarpgroup, lane = thread % 32;
    int const tiles = ceil_div(valid, S::kKeys), in_last = valid - (tiles - 1) * S::kKeys;
    bool const tail = in_last < S::kKeys;
    float const scale = p.scale * kLog2E;
    QueryBuffer const buffer = query_buffer<S>(consumer, progress.items);
    uint32_t const queries = shared.queries(buffer.index);
    sm90::Ring<kStages>&keys = progress.keys, &values = progress.values;
    float scores[S::kKeys / 2], correction[2];
    uint32_t probabilities[S::kKeys / 16][4];

    sm90::wait(shared.queries_full(buffer.index), buffer.phase);
    sm90::wait(shared.keys_full(keys.stage), keys.phase);
    if (tail) {
        sm90::wait(shared.key_tail(keys.stage), progress.tail_phase(keys.stage));
        sm90::fence_async_proxy();  // a tail comes through the generic proxy
    }
    __syncwarp();
    multiply_keys<T, S>(scores, queries, shared.keys(keys.stage));
    sm90::wait_for_products<0>();
    sm90::settle(scores);
    shared.release(shared.keys_empty(keys.stage), lane);
    keys.advance();
    if (tail) mask_columns(scores, thread, in_last);
    online.take(scores, scale, correction);
    pack_probabilities<T, S::kKeys>(scores, probabilities);
    if (tail) {
        sm90::wait(shared.value_tail(values.stage), progress.tail_phase(values.stage));
        sm90::fence_async_proxy();
        progress.tails ^= 1u << values.stage;
    }

#pragma unroll 1
    for (int step = 1; step < tiles; ++step) {
        sm90::wait(shared.keys_full(keys.stage), keys.phase);
        __syncwarp();
        begin_turn(consumer);
        multiply_keys<T, S>(scores, queries, shared.keys(keys.stage));
        sm90::wait(shared.values_full(values.stage), values.phase);
        __syncwarp();
        multiply_values<T, S>(sums, probabilities, shared.values(values.stage));
        pass_turn(consumer);
        sm90::wait_for_products<1>();  // the scores
        sm90::settle(scores);
        shared.release(shared.keys_empty(keys.stage), lane);
        __syncwarp();  // or the assembler puts the arrival off until all exponentials are there
        keys.advance();
        online.take(scores, scale, correction);
        sm90::compute_now(online.total[0] + online.total[1]);  // while the values' product is under way
        sm90::wait_for_products<0>();
        sm90::settle(sums);
        shared.release(shared.values_empty(values.stage), lane);
        values.advance();
        if (__any_sync(~0u, correction[0] != 1 || correction[1] != 1)) rescale(sums, correction);
        pack_probabilities<T, S::kKeys>(scores, probabilities);
    }

    if (lane == 0) sm90::arrive(shared.queries_empty(buffer.index));
    ++progress.items;
    sm90::wait(shared.values_full(values.stage), values.phase);
    __syncwarp();
    multiply_values<T, S>(sums, probabilities, shared.values(values.stage));
    sm90::wait_for_products<0>();
    sm90::settle(sums);
    shared.release(shared.values_empty(values.stage), lane);
    values.advance();
}

// Before, thread t of four holds values 2 t and 2 t + 1 of each of four chunks; after, all eight of chunk t.
__device__ inline void gather_chunk(uint32_t (&pairs)[4], int thread) {
    bool const odd = thread & 1, high = thread & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        uint32_t const got = __shfl_xor_sync(~0u, odd ? pairs[i] : pairs[i + 1], 1);
        (odd ? pairs[i] : pairs[i + 1]) = got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint32_t const got = __shfl_xor_sync(~0u, high ? pairs[i] : pairs[i + 2], 2);
        (high ? pairs[i] : pairs[i + 2]) = got;
    }
}

struct alignas(16) Chunk {
    uint32_t pairs[4];
};

// One of a thread's rows: divided, rounded, written, past the valid ones as zeros.
template <class T, class S>
__device__ void send_row(HopperParams const& p, Item const& item, int row, bool valid,
                         float const (&sums)[S::kFeatures / 2], int which, float factor, int thread) {
    T* const out = static_cast<T*>(p.out.data) + item.b * p.out.stride_b + row * p.out.stride_l +
                   item.n * p.out.stride_n + thread % 4 * sm90::kChunkElements;
#pragma unroll
    for (int group = 0; group < S::kFeatures / 32; ++group) {
        Chunk chunk;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float const* const pair = &sums[16 * group + 4 * i + 2 * which];
            chunk.pairs[i] = valid ? sm90::pack<T>(pair[0] * factor, pair[1] * factor) : 0;
        }
        gather_chunk(chunk.pairs, thread);
        if (row < p.L) *reinterpret_cast<Chunk*>(out + group * 32) = chunk;
    }
}

// One consumer's rows of an item, from `first_row` on, go out, with their log-sum-exp.
template <class T, class S>
__device__ void send_rows(HopperParams const& p, Item const& item, int first_row, int valid_tokens,
                          float const (&sums)[S::kFeatures / 2], Online const& online) {
    int const thread = threadIdx.x % sm90::kWarpgroup;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        int const row = first_row + sm90::accumulator_row(thread, 2 * which);
        bool const valid = row < valid_tokens;
        float const total = sum_of_four(online.total[which]);
        send_row<T, S>(p, item, row, valid, sums, which, total == 0 ? 0.0f : 1 / total, thread);
        if (thread % 4 == 0 && row < p.L) {
            float const lse = total == 0 ? -infinity() : online.shift[which] / kLog2E + logf(total);
            p.lse[(int64_t(item.b) * p.N + item.n) * p.L + row] = valid ? lse : -infinity();
        }
    }
}

template <class T, class S>
__device__ void consume(HopperParams const& p, Shared<S> const& shared, int consumer, uint32_t items) {
    Progress progress;
    if (consumer == 1) pass_turn(consumer);
    for (uint32_t index = blockIdx.x / S::kCluster; index < items; index += gridDim.x / S::kCluster) {
        Item const item = item_of(p, index, S::kCluster);
        TakingPart const valid = taking_part(p, item.b);
        float sums[S::kFeatures / 2] = {};
        Online online;
        if (item.first_row < valid.queries) attend<T, S>(p, shared, consumer, valid.keys, sums, online, progress);
        send_rows<T, S>(p, item, first_query(item, shared.rank, consumer), valid.queries, sums, online);
    }
    __syncwarp();
    if (consumer == 0) begin_turn(consumer);  // the last one is passed to nobody else
}

template <class T, class S>
__device__ void produce(HopperParams const& p, Maps const& maps, Shared<S> const& shared, uint32_t items) {
    int const lane = threadIdx.x % 32;
    if (lane == 0) sm90::prefetch_map(maps.q), sm90::prefetch_map(maps.k), sm90::prefetch_map(maps.v);
    Progress progress;
    for (uint32_t index = blockIdx.x / S::kCluster; index < items; index += gridDim.x / S::kCluster) {
        Item const item = item_of(p, index, S::kCluster);
        TakingPart const valid = taking_part(p, item.b);
        if (item.first_row < valid.queries) fetch_item<T, S>(p, maps, shared, item, valid.keys, lane, progress);
    }
    // stays until all that it has begun is there and read, in all blocks
    for (int stage = 0; stage < kStages; ++stage, progress.values.advance()) {
        sm90::wait(shared.values_empty(progress.values.stage), progress.values.phase ^ 1);
    }
}

#endif  // HUNYUAN_SM90A

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(__grid_constant__ HopperParams const p, __grid_constant__ Maps const maps, uint32_t items,
                   __grid_constant__ QueriesOf<S> const raw) {
#ifdef HUNYUAN_SM90A
    uint32_t const start = sm90::shared_address(sm90::dynamic_shared());
    Shared<S> const shared{(start + sm90::kAtomBytes - 1) / sm90::kAtomBytes * sm90::kAtomBytes,
                           int(blockIdx.x % S::kCluster)};
    if (threadIdx.x == 0) shared.init_barriers();
    sync_blocks<S>();
    int const role = __shfl_sync(~0u, int(threadIdx.x) / sm90::kWarpgroup, 0);
    if (role == 0) {
        sm90::give_registers<kProducerRegisters>();
        if constexpr (S::kRaw) {
            int const warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0);
            warp == 0 ? produce<T, S>(p, maps, shared, items) : prepare<T, S>(p, raw, shared, items, warp - 1);
        } else {
            if (threadIdx.x < 32) produce<T, S>(p, maps, shared, items);
        }
    } else {
        sm90::take_registers<kConsumerRegisters>();
        consume<T, S>(p, shared, role - 1, items);
    }
    if constexpr (S::kCluster > 1) sm90::sync_cluster();  // whoever leaves first is still arrived at
#else
    __trap();
#endif
}

template <class T>
sm90::TensorMap map_of(HopperParams const& p, Rows const& rows, int length, int box_rows) {
    sm90::TensorBox box;
    box.data = rows.data;
    box.element = std::is_same_v<T, __half> ? sm90::Element::f16 : sm90::Element::bf16;
    int64_t const size[4] = {p.D, length, p.N, p.B}, stride[4] = {1, rows.stride_l, rows.stride_n, rows.stride_b};
    int const extent[4] = {sm90::kRowElements, box_rows, 1, 1};
    for (int i = 0; i < 4; ++i) box.size[i] = size[i], box.stride[i] = stride[i], box.box[i] = extent[i];
    return sm90::make_tensor_map(box);
}

// `raw`: where queries come from that are not in `p`.
template <class T, class S>
void run_shape(HopperParams const& p, QueriesOf<S> const& raw, void* stream) {
    constexpr int Cluster = S::kCluster;
    Maps const maps{map_of<T>(p, S::kRaw ? p.k : p.q, p.L, sm90::kBlockRows),
                    map_of<T>(p, p.k, p.keys, S::kFetchedKeys), map_of<T>(p, p.v, p.keys, S::kFetchedKeys)};
    auto const items = uint32_t(items_of(p));
    unsigned const most = unsigned(sm90::processors()) / Cluster;
    unsigned const blocks = (items < most ? items : most) * Cluster;
    auto const kernel = forward_kernel<T, S>;
    if constexpr (Cluster == 1) {
        sm90::launch(kernel, blocks, kThreads, S::kAllocated, stream, p, maps, items, raw);
    } else {
        sm90::launch_clusters(kernel, Cluster, blocks, kThreads, S::kAllocated, stream, p, maps, items, raw);
    }
}

template <class T, int D, int Keys>
void run_tile(HopperParams const& p, void* stream) {
    p.cluster == 2 ? run_shape<T, Shape<D, Keys, 2>>(p, {}, stream) : run_shape<T, Shape<D, Keys, 1>>(p, {}, stream);
}

template <class T>
void run_hopper(HopperParams const& p, void* stream) {
    bool const wide = p.key_tile == 176;
    if (p.D == 64) return wide ? run_tile<T, 64, 176>(p, stream) : run_tile<T, 64, 128>(p, stream);
    wide ? run_tile<T, 128, 176>(p, stream) : run_tile<T, 128, 128>(p, stream);
}

template <class T, int D>
void run_raw_tile(HopperParams const& p, RawQueries const& raw, void* stream) {
    p.cluster == 2 ? run_shape<T, Shape<D, 176, 2, true>>(p, raw, stream)
                   : run_shape<T, Shape<D, 176, 1, true>>(p, raw, stream);
}

template <class T>
void run_hopper_raw(HopperParams const& p, RawQueries const& raw, void* stream) {
    p.D == 64 ? run_raw_tile<T, 64>(p, raw, stream) : run_raw_tile<T, 128>(p, raw, stream);
}

}  // namespace hunyuan_fast::rope3d_attention
