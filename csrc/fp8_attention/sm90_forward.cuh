// The Hopper kernel over codes: one thread fetches, two consumer warpgroups multiply and exponentiate. A consumer
// begins the product of its next scores together with that of its last probabilities, and exponentiates the former
// while the latter is under way. Consumers take turns: while one of them exponentiates, the other one's products have
// the tensor cores. Blocks stay and take item after item. Where two of them share a cluster, they take neighbouring
// rows of a head.
//
// The tensor cores keep some 14 bits of sums of eight-bit products. So each tile's product begins at zero, and is added
// to those of the tiles before in fp32: one multiplication and addition, as rescaling these would have needed anyway.
#pragma once

#include <type_traits>

#include "common/sm90_e4m3.cuh"
#include "common/sm90_launch.cuh"
#include "common/sm90_products.cuh"
#include "fp8_attention/sm90_fetch.cuh"

namespace hunyuan_fast::fp8_attention {

// Registers of a thread after the roles part: 3 x 128 x 168 in all before.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;

#ifdef HUNYUAN_SM90A

constexpr int kSums = kFeatures / 2, kScores = kKeys / 2;  // of a thread
constexpr int kCodeSteps = kKeys / kCodeDepth;
constexpr float kTopLog2 = 8;  // probabilities are coded as 256 p
constexpr int kFirstTurn = 1;  // named barriers, one for each consumer; 0 is that of __syncthreads

__device__ constexpr float infinity() { return __builtin_inff(); }

// A consumer begins its turn when the other one has passed it on.
__device__ inline void begin_turn(int consumer) {
    sm90::sync_named(kFirstTurn + consumer, kConsumers * sm90::kWarpgroup);
}
__device__ inline void pass_turn(int consumer) {
    sm90::arrive_named(kFirstTurn + (consumer ^ 1), kConsumers * sm90::kWarpgroup);
}

__device__ inline int row_of_sum(int i) { return i / 2 % 2; }  // which of a thread's rows register i is of

__device__ inline float largest_of_four(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float sum_of_four(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// What has been seen of two rows of scores.
struct Online {
    float shift[2] = {-infinity(), -infinity()};  // the largest score, as an exponent of two
    float total[2] = {};                          // of exponentials, of this thread's columns

    // Turns scores into 256 times their exponentials relative to the largest so far. `correction` is what those before
    // are off by. `scale` is that of these scores for powers of two.
    __device__ void take(float (&scores)[kScores], float scale, float (&correction)[2]) {
        float top[2][2] = {{-infinity(), -infinity()}, {-infinity(), -infinity()}};  // two of each: shorter chains
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
            float& mine = top[row_of_sum(i)][i % 2];
            mine = fmaxf(mine, scores[i]);
        }
        float offset[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float const before = shift[row];
            shift[row] = fmaxf(before, largest_of_four(fmaxf(top[row][0], top[row][1])) * scale);
            correction[row] = sm90::exp2_approx(before - shift[row]);
            total[row] *= correction[row];
            offset[row] = kTopLog2 - shift[row];
        }
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
            int const row = row_of_sum(i);
            scores[i] = sm90::exp2_approx(fmaf(scores[i], scale, offset[row]));
            total[row] += scores[i];
        }
    }
};

// Scores of columns from `valid` on count for nothing.
__device__ inline void mask_columns(float (&scores)[kScores], int thread, int valid) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
        if (sm90::accumulator_column(thread, i) >= valid) scores[i] = -infinity();
    }
}

// scores = queries keys^T
__device__ inline void multiply_keys(float (&scores)[kScores], uint32_t queries_at, uint32_t keys_at) {
    uint64_t const queries = sm90::descriptor(queries_at), keys = sm90::descriptor(keys_at);
    sm90::fence_products();
#pragma unroll
    for (int k = 0; k < kFeatures / kCodeDepth; ++k) {
        uint64_t const step = sm90::descriptor_step(k);  // 32 bytes, as for 16 values of 16 bits
        sm90::multiply_e4m3<kKeys>(scores, queries + step, keys + step, k > 0);
    }
    sm90::commit_products();
}

// part = probabilities values
__device__ inline void multiply_values(float (&part)[kSums], uint32_t const (&probabilities)[kCodeSteps][4],
                                       uint32_t values_at) {
    uint64_t const values = sm90::descriptor(values_at);
    sm90::fence_products();
#pragma unroll
    for (int k = 0; k < kCodeSteps; ++k) {
        sm90::multiply_e4m3<kFeatures>(part, probabilities[k], values + sm90::descriptor_step(k), k > 0);
    }
    sm90::commit_products();
}

// The scores of a thread are its part of the next product's operand.
__device__ inline void code_probabilities(float const (&scores)[kScores], uint32_t (&probabilities)[kCodeSteps][4]) {
#pragma unroll
    for (int k = 0; k < kCodeSteps; ++k) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            probabilities[k][r] = sm90::pack_e4m3(scores[coded_score(k, r, 0)], scores[coded_score(k, r, 1)],
                                                  scores[coded_score(k, r, 2)], scores[coded_score(k, r, 3)]);
        }
    }
}

__device__ inline void add(float (&sums)[kSums], float const (&correction)[2], float const (&part)[kSums]) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = fmaf(sums[i], correction[row_of_sum(i)], part[i]);
}

// Sums, not yet divided by the totals, of one consumer's rows of an item.
template <int Cluster>
__device__ void attend(HopperParams const& p, Shared<Cluster> const& shared, Item const& item, int consumer, int valid,
                       float (&sums)[kSums], Online& online, Progress& progress) {
    int const thread = threadIdx.x % sm90::kWarpgroup, lane = thread % 32;
    int const tiles = ceil_div(valid, kKeys), in_last = valid - (tiles - 1) * kKeys;
    int64_t const head = head_of(p, item);
    int const blocks = p.Lp / sm90::kBlockRows, block = first_query(item, shared.rank, consumer) / sm90::kBlockRows;
    float const q_scale = p.codes.q_scale[head * blocks + (block < blocks ? block : blocks - 1)];
    float const* const k_scale = p.codes.k_scale + head * (p.Lp / kKeys);
    uint32_t const queries = shared.queries(consumer);
    sm90::Ring<kStages>&keys = progress.keys, &values = progress.values;
    float scores[kScores], part[kSums];
    float correction[2], next_correction[2];  // of the sums before a part, and before the one after it
    uint32_t probabilities[kCodeSteps][4];

    float scale = q_scale * k_scale[tiles - 1];
    sm90::wait(shared.queries_full(consumer), progress.items & 1);
    sm90::wait(shared.keys_full(keys.stage), keys.phase);
    __syncwarp();
    multiply_keys(scores, queries, shared.keys(keys.stage));
    sm90::wait_for_products<0>();
    sm90::settle(scores);
    shared.release(shared.keys_empty(keys.stage), lane);
    keys.advance();
    if (in_last < kKeys) mask_columns(scores, thread, in_last);
    online.take(scores, scale, correction);
    code_probabilities(scores, probabilities);

#pragma unroll 1
    for (int step = 1; step < tiles; ++step) {
        scale = q_scale * k_scale[tile_of(step, tiles)];
        sm90::wait(shared.keys_full(keys.stage), keys.phase);
        __syncwarp();
        begin_turn(consumer);
        multiply_keys(scores, queries, shared.keys(keys.stage));
        sm90::wait(shared.values_full(values.stage), values.phase);
        __syncwarp();
        multiply_values(part, probabilities, shared.values(values.stage));
        pass_turn(consumer);
        sm90::wait_for_products<1>();  // the scores
        sm90::settle(scores);
        shared.release(shared.keys_empty(keys.stage), lane);
        keys.advance();
        online.take(scores, scale, next_correction);
        sm90::compute_now(online.total[0] + online.total[1]);  // while the values' product is under way
        sm90::wait_for_products<0>();
        sm90::settle(part);
        shared.release(shared.values_empty(values.stage), lane);
        values.advance();
        add(sums, correction, part);
        correction[0] = next_correction[0], correction[1] = next_correction[1];
        code_probabilities(scores, probabilities);
    }

    if (lane == 0) sm90::arrive(shared.queries_empty(consumer));
    ++progress.items;
    sm90::wait(shared.values_full(values.stage), values.phase);
    __syncwarp();
    multiply_values(part, probabilities, shared.values(values.stage));
    sm90::wait_for_products<0>();
    sm90::settle(part);
    shared.release(shared.values_empty(values.stage), lane);
    values.advance();
    add(sums, correction, part);
}

template <class T>
__device__ void write_pair(T* to, float low, float high) {
    if constexpr (std::is_same_v<T, float>) {
        *reinterpret_cast<float2*>(to) = make_float2(low, high);
    } else {
        *reinterpret_cast<uint32_t*>(to) = sm90::pack<T>(low, high);
    }
}

// One consumer's rows of an item, from `first_row` on, go out: divided, scaled, about the mean of the values; past the
// valid ones zeros.
template <class T>
__device__ void send_rows(HopperParams const& p, Item const& item, int first_row, int valid,
                          float const (&sums)[kSums], Online const& online) {
    int const thread = threadIdx.x % sm90::kWarpgroup;
    int64_t const features = head_of(p, item) * kFeatures;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        int const row = first_row + sm90::accumulator_row(thread, 2 * which);
        float const total = sum_of_four(online.total[which]);
        if (row >= p.L) continue;
        T* const out = static_cast<T*>(p.out) + item.b * p.stride_b + row * p.stride_l + item.n * p.stride_n;
        float const factor = 1 / total;
#pragma unroll
        for (int i = 2 * which; i < kSums; i += 4) {
            int const feature = sm90::accumulator_column(thread, i);
            float result[2] = {};
#pragma unroll
            for (int one = 0; row < valid && one < 2; ++one) {
                result[one] = fmaf(sums[i + one] * factor, p.codes.v_scale[features + feature + one],
                                   p.codes.v_mean[features + feature + one]);
            }
            write_pair(out + feature, result[0], result[1]);
        }
    }
}

template <class T, int Cluster>
__device__ void consume(HopperParams const& p, Shared<Cluster> const& shared, int consumer, uint32_t items) {
    Progress progress;
    if (consumer == 1) pass_turn(consumer);
    for (uint32_t index = blockIdx.x / Cluster; index < items; index += gridDim.x / Cluster) {
        Item const item = item_of(p, index, Cluster);
        int const valid = valid_tokens(p, item.b);
        float sums[kSums] = {};
        Online online;
        if (item.first_row < valid) attend(p, shared, item, consumer, valid, sums, online, progress);
        send_rows<T>(p, item, first_query(item, shared.rank, consumer), valid, sums, online);
    }
    __syncwarp();
    if (consumer == 0) begin_turn(consumer);  // the last one is passed to nobody else
}

template <int Cluster>
__device__ void produce(HopperParams const& p, Maps const& maps, Shared<Cluster> const& shared, uint32_t items) {
    Progress progress;
    for (uint32_t index = blockIdx.x / Cluster; index < items; index += gridDim.x / Cluster) {
        Item const item = item_of(p, index, Cluster);
        int const valid = valid_tokens(p, item.b);
        if (item.first_row < valid) fetch_item(maps, shared, item, valid, progress);
    }
    // stays until all that it has begun is there and read, in all blocks
    for (int stage = 0; stage < kStages; ++stage, progress.values.advance()) {
        sm90::wait(shared.values_empty(progress.values.stage), progress.values.phase ^ 1);
    }
}

#endif  // HUNYUAN_SM90A

template <class T, int Cluster>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(__grid_constant__ HopperParams const p, __grid_constant__ Maps const maps, uint32_t items) {
#ifdef HUNYUAN_SM90A
    uint32_t const start = sm90::shared_address(sm90::dynamic_shared());
    Shared<Cluster> const shared{(start + sm90::kAtomBytes - 1) / sm90::kAtomBytes * sm90::kAtomBytes,
                                 int(blockIdx.x % Cluster)};
    if (threadIdx.x == 0) shared.init_barriers();
    sync_blocks<Cluster>();
    int const role = __shfl_sync(~0u, int(threadIdx.x) / sm90::kWarpgroup, 0);
    if (role == 0) {
        sm90::give_registers<kProducerRegisters>();
        if (threadIdx.x == 0) produce(p, maps, shared, items);
    } else {
        sm90::take_registers<kConsumerRegisters>();
        consume<T>(p, shared, role - 1, items);
    }
    if constexpr (Cluster > 1) sm90::sync_cluster();  // whoever leaves first is still arrived at
#else
    __trap();
#endif
}

// Of a tensor (B, N, rows, columns) of codes, in boxes of 128 columns.
inline sm90::TensorMap map_of(HopperParams const& p, void const* codes, int64_t rows, int64_t columns, int box_rows) {
    sm90::TensorBox box;
    box.data = codes;
    box.element = sm90::Element::e4m3;
    int64_t const size[4] = {columns, rows, p.N, p.B};
    int const extent[4] = {sm90::kRowBytes, box_rows, 1, 1};
    int64_t stride = 1;
    for (int i = 0; i < 4; ++i) {
        box.size[i] = size[i], box.stride[i] = stride, box.box[i] = extent[i];
        stride *= size[i];
    }
    return sm90::make_tensor_map(box);
}

template <class T, int Cluster>
void run_cluster(HopperParams const& p, void* stream) {
    Maps const maps{map_of(p, p.codes.q, p.Lp, kFeatures, sm90::kBlockRows),
                    map_of(p, p.codes.k, p.Lp, kFeatures, kKeys / Cluster),
                    map_of(p, p.codes.v, kFeatures, p.Lp, kFeatures / Cluster)};
    auto const items = uint32_t(items_of(p));
    unsigned const most = unsigned(sm90::processors()) / Cluster;
    unsigned const blocks = (items < most ? items : most) * Cluster;
    auto const kernel = forward_kernel<T, Cluster>;
    if constexpr (Cluster == 1) {
        sm90::launch(kernel, blocks, kThreads, kAllocated, stream, p, maps, items);
    } else {
        sm90::launch_clusters(kernel, Cluster, blocks, kThreads, kAllocated, stream, p, maps, items);
    }
}

template <class T>
void run_hopper(HopperParams const& p, void* stream) {
    p.cluster == 2 ? run_cluster<T, 2>(p, stream) : run_cluster<T, 1>(p, stream);
}

}  // namespace hunyuan_fast::fp8_attention
