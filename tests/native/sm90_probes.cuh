// Hopper's machine in kernels of a few lines, each with one thing that the real ones rely on. They run on a GPU
// (sm90_probes.cu) and on the emulated machine (hopper_probes.cpp): where these two part, one of them is mistaken.
#pragma once

#include "common/sm90_e4m3.cuh"
#include "common/sm90_launch.cuh"
#include "common/sm90_products.cuh"
#include "common/sm90_tensor_copy.cuh"
#include "common/sm90_turns.cuh"

namespace hunyuan_fast::probes {

// A tensor (1, rows, heads, width) in boxes of 128 bytes by `box_rows`.
inline sm90::TensorMap map_of(void const* data, sm90::Element element, int width, int rows, int heads, int box_rows) {
    sm90::TensorBox box;
    box.data = data, box.element = element;
    // neighbouring rows are farther from each other than neighbouring heads
    int64_t const size[4] = {width, rows, heads, 1}, stride[4] = {1, int64_t(heads) * width, width, 1};
    int const extent[4] = {sm90::kRowBytes / sm90::bytes_of(element), box_rows, 1, 1};
    for (int i = 0; i < 4; ++i) box.size[i] = size[i], box.stride[i] = stride[i], box.box[i] = extent[i];
    return sm90::make_tensor_map(box);
}

#ifdef HUNYUAN_SM90A

// From a multiple of an atom on.
__device__ inline char* aligned_shared() {
    char* const memory = sm90::dynamic_shared();
    return memory + (sm90::kAtomBytes - sm90::shared_address(memory) % sm90::kAtomBytes) % sm90::kAtomBytes;
}

#endif

// ---- a cluster of two blocks: each fetches half of every tile for both, and gives a stage back to both

constexpr int kSharedRows = 32, kSharedStages = 2;
constexpr uint32_t kSharedTile = kSharedRows * sm90::kRowBytes;
constexpr uint32_t kShareBytes = kSharedStages * (kSharedTile + 16) + sm90::kAtomBytes;
constexpr int kShareThreads = 64;  // a warp that fetches, one that reads

// Round r reads rows from 32 (r / heads) on of head r % heads, beyond the last of which zeros are read. `to` gets what
// each block (2) has in each round, as it lies in shared memory.
__global__ void __launch_bounds__(kShareThreads, 1)
    share_kernel(__grid_constant__ sm90::TensorMap const map, uint4* to, int heads, int rounds) {
#ifdef HUNYUAN_SM90A
    char* const memory = aligned_shared();
    uint32_t const base = sm90::shared_address(memory), barriers = base + kSharedStages * kSharedTile;
    int const rank = int(blockIdx.x % 2), lane = int(threadIdx.x % 32);
    auto const full = [&](int stage) { return barriers + stage * 16; };
    auto const empty = [&](int stage) { return barriers + stage * 16 + 8; };
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kSharedStages; ++stage) {
            sm90::init_barrier(full(stage), 1);
            sm90::init_barrier(empty(stage), 2);  // the reading warps of both blocks
        }
        sm90::fence_async_proxy();
    }
    sm90::sync_cluster();
    sm90::Ring<kSharedStages> ring;
    for (int round = 0; threadIdx.x == 0 && round < rounds; ++round, ring.advance()) {
        sm90::wait(empty(ring.stage), ring.phase ^ 1);
        sm90::arrive_expecting(full(ring.stage), kSharedTile);
        int const part = rank * kSharedRows / 2;
        sm90::copy_tensor_to_cluster(base + ring.stage * kSharedTile + part * sm90::kRowBytes, map, 0,
                                     round / heads * kSharedRows + part, round % heads, 0, full(ring.stage), 3);
    }
    for (int round = 0; threadIdx.x >= 32 && round < rounds; ++round, ring.advance()) {
        sm90::wait(full(ring.stage), ring.phase);
        __syncwarp();
        constexpr int kChunks = kSharedTile / sm90::kChunkBytes;
        auto const* const from = reinterpret_cast<uint4 const*>(memory + ring.stage * kSharedTile);
        uint4* const here = to + (int(blockIdx.x) * rounds + round) * kChunks;
        for (int i = lane; i < kChunks; i += 32) here[i] = from[i];
        sm90::fence_async_proxy();  // read through the generic proxy, then written by copies
        __syncwarp();
        if (lane < 2) sm90::arrive_remote(empty(ring.stage), lane);
    }
    sm90::sync_cluster();
#else
    __trap();
#endif
}

// `from` (rows, heads, 64) of 16-bit values.
inline void share(void const* from, uint4* to, int rows, int heads, int rounds, void* stream) {
    auto const map = map_of(from, sm90::Element::bf16, sm90::kRowElements, rows, heads, kSharedRows / 2);
    sm90::launch_clusters(share_kernel, 2, 2, kShareThreads, kShareBytes, stream, map, to, heads, rounds);
}

// ---- products of eight-bit numbers: d (64, 128) = a (64, 128) b (128, 128)^T

constexpr int kByteColumns = 128, kByteDepth = 128;
constexpr uint32_t kLeftBytes = 64 * sm90::kRowBytes, kRightBytes = kByteColumns * sm90::kRowBytes;
constexpr uint32_t kBytesShared = kLeftBytes + kRightBytes + 16 + sm90::kAtomBytes;

struct ByteMaps {
    sm90::TensorMap a;
    sm90::TensorMap b;
};

// From registers: `values` are the numbers of a.
template <bool Registers>
__global__ void __launch_bounds__(sm90::kWarpgroup, 1)
    bytes_kernel(__grid_constant__ ByteMaps const maps, float const* values, float* d) {
#ifdef HUNYUAN_SM90A
    uint32_t const base = sm90::shared_address(aligned_shared()), right = base + kLeftBytes;
    uint32_t const barrier = right + kRightBytes;
    int const thread = int(threadIdx.x);
    if (thread == 0) {
        sm90::init_barrier(barrier, 1);
        sm90::fence_async_proxy();
        sm90::arrive_expecting(barrier, kLeftBytes + kRightBytes);
        sm90::copy_tensor(base, maps.a, 0, 0, 0, 0, barrier);
        sm90::copy_tensor(right, maps.b, 0, 0, 0, 0, barrier);
    }
    __syncthreads();
    sm90::wait(barrier, 0);
    __syncwarp();
    uint32_t coded[kByteDepth / 32][4];
#pragma unroll
    for (int k = 0; k < kByteDepth / 32; ++k)
#pragma unroll
        for (int r = 0; r < 4 && Registers; ++r) {
            int const row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (r % 2);
            float const* const four = values + row * kByteDepth + 32 * k + 16 * (r / 2) + 4 * (thread % 4);
            coded[k][r] = sm90::pack_e4m3(four[0], four[1], four[2], four[3]);
        }
    float sums[kByteColumns / 2];
    uint64_t const a = sm90::descriptor(base), b = sm90::descriptor(right);
    sm90::fence_products();
#pragma unroll
    for (int k = 0; k < kByteDepth / 32; ++k) {
        uint64_t const step = sm90::descriptor_step(k);
        if constexpr (Registers) {
            sm90::multiply_e4m3<kByteColumns>(sums, coded[k], b + step, k);
        } else {
            sm90::multiply_e4m3<kByteColumns>(sums, a + step, b + step, k);
        }
    }
    sm90::commit_products();
    sm90::wait_for_products<0>();
    sm90::settle(sums);
    for (int i = 0; i < kByteColumns / 2; ++i) {
        d[sm90::accumulator_row(thread, i) * kByteColumns + sm90::accumulator_column(thread, i)] = sums[i];
    }
#else
    __trap();
#endif
}

// `values`: null, or what `a` stands for, which then does not come from memory.
inline void multiply_bytes(void const* a, void const* b, float const* values, float* d, void* stream) {
    ByteMaps const maps{map_of(a, sm90::Element::e4m3, kByteDepth, 64, 1, 64),
                        map_of(b, sm90::Element::e4m3, kByteDepth, kByteColumns, 1, kByteColumns)};
    auto const kernel = values == nullptr ? bytes_kernel<false> : bytes_kernel<true>;
    sm90::launch(kernel, 1, sm90::kWarpgroup, kBytesShared, stream, maps, values, d);
}

// ---- a tile of which only some rows are there, by cp.async: d (64, 64) = a (64, 64) b (64, 64)^T, where rows of both
// from `valid` on are zeros, and not read

constexpr uint32_t kTailShared = 2 * kLeftBytes + 16 + sm90::kAtomBytes;

template <class T>
__global__ void __launch_bounds__(sm90::kWarpgroup, 1) tail_kernel(T const* a, T const* b, float* d, int valid) {
#ifdef HUNYUAN_SM90A
    uint32_t const base = sm90::shared_address(aligned_shared()), barrier = base + 2 * kLeftBytes;
    int const thread = int(threadIdx.x);
    if (thread == 0) {
        sm90::init_barrier(barrier, sm90::kWarpgroup);
        sm90::fence_async_proxy();
    }
    __syncthreads();
    for (int i = thread; i < 2 * 64 * sm90::kRowChunks; i += sm90::kWarpgroup) {
        int const tile = i / (64 * sm90::kRowChunks), row = i / sm90::kRowChunks % 64, chunk = i % sm90::kRowChunks;
        bool const given = row < valid;
        sm90::copy_chunk(base + tile * kLeftBytes + sm90::chunk_offset(row, chunk),
                         (tile == 0 ? a : b) + (given ? row : 0) * 64 + chunk * sm90::kChunkElements,
                         given ? sm90::kChunkBytes : 0u);
    }
    sm90::arrive_after_copies(barrier);
    sm90::wait(barrier, 0);
    sm90::fence_async_proxy();
    __syncwarp();
    float sums[32];
    sm90::fence_products();
    for (int k = 0; k < 4; ++k) {
        uint64_t const step = sm90::descriptor_step(k);
        sm90::multiply<T, 64>(sums, sm90::descriptor(base) + step, sm90::descriptor(base + kLeftBytes) + step, k);
    }
    sm90::commit_products();
    sm90::wait_for_products<0>();
    sm90::settle(sums);
    for (int i = 0; i < 32; ++i) {
        d[sm90::accumulator_row(thread, i) * 64 + sm90::accumulator_column(thread, i)] = sums[i];
    }
#else
    __trap();
#endif
}

template <class T>
void multiply_tails(T const* a, T const* b, float* d, int valid, void* stream) {
    sm90::launch(tail_kernel<T>, 1, sm90::kWarpgroup, kTailShared, stream, a, b, d, valid);
}

// ---- blocks that add to the same places, one after the other in the order in which they start

constexpr int kTurnNumbers = 256, kTurnPlaces = 4;
constexpr uint32_t kTurnBytes = kTurnNumbers * 4;

// Of the block with a ticket. Sums of these are rounded, so they depend on the order.
HUNYUAN_HOST_DEVICE inline float share_of(int ticket, int place, int i) {
    return float((ticket * 7919 + place * 613 + i * 31) % 2003 - 1001) * 0.1f;
}

// `counters`: of tickets, and whose turn it is at each place; zeros.
__global__ void __launch_bounds__(32) turns_kernel(float* sums, int* counters) {
#ifdef HUNYUAN_SM90A
    char* const memory = aligned_shared();
    int const lane = int(threadIdx.x), ticket = __shfl_sync(~0u, lane == 0 ? sm90::take_ticket(counters) : 0, 0);
    for (int place = 0; place < kTurnPlaces; ++place) {
        for (int i = lane; i < kTurnNumbers; i += 32) {
            reinterpret_cast<float*>(memory)[i] = share_of(ticket, place, i);
        }
        sm90::fence_async_proxy();
        __syncwarp();
        if (lane == 0) {
            sm90::wait_for_turn(counters + 1 + place, ticket);
            sm90::reduce_add(sums + place * kTurnNumbers, sm90::shared_address(memory), kTurnBytes);
            sm90::commit_stores();
            sm90::wait_for_stores<0>();
            sm90::pass_turn(counters + 1 + place, ticket + 1);
        }
        __syncwarp();
    }
#else
    __trap();
#endif
}

// `sums` (places, numbers), `counters` (1 + places).
inline void add_in_turns(float* sums, int* counters, int blocks, void* stream) {
    sm90::launch(turns_kernel, unsigned(blocks), 32, kTurnBytes + sm90::kAtomBytes, stream, sums, counters);
}

}  // namespace hunyuan_fast::probes
