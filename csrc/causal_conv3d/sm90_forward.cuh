// The Hopper kernel: a producer warpgroup gathers rows by their addresses and fetches packed weights, two consumer
// warpgroups multiply and send the sums out. Blocks stay and take tile after tile; while the sums of one go out, the
// stages of the next already fill.
#pragma once

#include "causal_conv3d/sm90_layout.h"
#include "common/sm90_launch.cuh"
#include "common/sm90_products.cuh"

namespace hunyuan_fast::causal_conv3d {

// Registers of a thread after the roles part: 3 x 128 x 168 in all before.
constexpr int kProducerRegisters = 72;
constexpr int kConsumerRegisters = 216;

#ifdef HUNYUAN_SM90A

// Addresses in shared memory.
template <class Shape>
struct Stages {
    uint32_t base;

    __device__ uint32_t rows(int stage) const { return base + stage * Shape::kRowsBytes; }
    __device__ uint32_t weights(int stage) const { return base + Shape::kWeights + stage * Shape::kWeightBytes; }
    __device__ uint32_t full(int stage) const { return base + Shape::kBarriers + stage * 8; }
    __device__ uint32_t empty(int stage) const { return base + Shape::kBarriers + (kStages + stage) * 8; }
};

template <class T>
__device__ T const* channels_of(HopperParams const& p, Source const& source) {
    return static_cast<T const*>(source.past ? p.past.data : p.x.data) + source.offset;
}

template <class T>
__device__ T const* handed_around(T const* pointer, int lane) {
    return reinterpret_cast<T const*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(pointer), lane));
}

// Fills the stages of one tile.
template <class T, class Shape>
__device__ void fetch_tile(HopperParams const& p, Stages<Shape> const& stages, TilePlace tile,
                           sm90::Ring<kStages>& ring) {
    int const thread = threadIdx.x % sm90::kWarpgroup, warp = thread / 32, lane = thread % 32;
    Place places[Shape::kRowBlocks];
#pragma unroll
    for (int r = 0; r < Shape::kRowBlocks; ++r) {
        places[r] = place_of(p, tile.first_row + first_copied_row(r, warp) + lane);
    }
    auto const* weights = static_cast<T const*>(p.weights) +
                          packed_stage(tile.column_tile, 0, steps_of(p.C, p.kernel), Shape::kColumns);
    Extent tap;
    for (tap.t = 0; tap.t < p.kernel.t; ++tap.t)
        for (tap.h = 0; tap.h < p.kernel.h; ++tap.h)
            for (tap.w = 0; tap.w < p.kernel.w; ++tap.w) {
                T const* from[Shape::kRowBlocks][kCopiesPerBlock];
#pragma unroll
                for (int r = 0; r < Shape::kRowBlocks; ++r) {
                    T const* const own = channels_of<T>(p, source_of(p, places[r], tap));
#pragma unroll
                    for (int i = 0; i < kCopiesPerBlock; ++i) {
                        from[r][i] = handed_around(own, copied_row(lane, i)) + copied_chunk(lane) * sm90::kChunkElements;
                    }
                }
#pragma unroll 1
                for (int c = 0; c < p.C; c += kStepChannels) {
                    sm90::wait(stages.empty(ring.stage), ring.phase ^ 1);
                    uint32_t const full = stages.full(ring.stage);
                    if (thread == 0) {
                        sm90::arrive_expecting(full, Shape::kWeightBytes);
                        sm90::copy_bulk(stages.weights(ring.stage), weights, Shape::kWeightBytes, full);
                    }
                    weights += Shape::kWeightBytes / sizeof(T);
                    uint32_t const rows = stages.rows(ring.stage);
#pragma unroll
                    for (int r = 0; r < Shape::kRowBlocks; ++r) {
#pragma unroll
                        for (int i = 0; i < kCopiesPerBlock; ++i) {
                            sm90::copy_chunk(rows + copied_offset(r, warp, lane, i), from[r][i]);
                            from[r][i] += kStepChannels;
                        }
                    }
                    sm90::arrive_after_copies(full);
                    ring.advance();
                }
            }
}

// The sums of one consumer.
template <class T, class Shape>
__device__ void multiply_tile(HopperParams const& p, Stages<Shape> const& stages, int consumer,
                              float (&sums)[Shape::kBlocks][Shape::kColumns / 2], sm90::Ring<kStages>& ring) {
    int const steps = steps_of(p.C, p.kernel), lane = threadIdx.x % 32;
    int before = 0;  // the stage of the step before
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        sm90::wait(stages.full(ring.stage), ring.phase);
        sm90::fence_async_proxy();  // rows came through the generic proxy
        __syncwarp();
        uint64_t const weights = sm90::descriptor(stages.weights(ring.stage));
        uint64_t const rows = sm90::descriptor(stages.rows(ring.stage) +
                                               block_row(consumer, 0, Shape::kBlocks) * sm90::kRowBytes);
        sm90::fence_products();
#pragma unroll
        for (int k = 0; k < kStepChannels / sm90::kDepth; ++k) {
#pragma unroll
            for (int block = 0; block < Shape::kBlocks; ++block) {
                uint64_t const a = rows + uint64_t(block * sm90::kBlockRows * sm90::kRowBytes >> 4);
                sm90::multiply<T, Shape::kColumns>(sums[block], a + sm90::descriptor_step(k),
                                                   weights + sm90::descriptor_step(k), step | k);
            }
        }
        sm90::commit_products();
        sm90::wait_for_products<1>();  // those of the step before
        if (step > 0 && lane == 0) sm90::arrive(stages.empty(before));
        before = ring.stage;
        ring.advance();
    }
    sm90::wait_for_products<0>();
    if (lane == 0) sm90::arrive(stages.empty(before));
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) sm90::settle(sums[block]);
}

struct alignas(16) Eight16 {
    uint32_t pairs[4];
};

template <class T>
__device__ float2 unpacked(uint32_t pair) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __bfloat1622float2(reinterpret_cast<__nv_bfloat162 const&>(pair));
    } else {
        return __half22float2(reinterpret_cast<__half2 const&>(pair));
    }
}

template <class T>
__device__ uint32_t packed(float2 pair) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        __nv_bfloat162 const both = __float22bfloat162_rn(pair);
        return reinterpret_cast<uint32_t const&>(both);
    } else {
        __half2 const both = __float22half2_rn(pair);
        return reinterpret_cast<uint32_t const&>(both);
    }
}

template <class T>
__device__ void add(float (&sums)[8], void const* eight) {
    auto const values = *static_cast<Eight16 const*>(eight);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 const pair = unpacked<T>(values.pairs[i]);
        sums[2 * i] += pair.x, sums[2 * i + 1] += pair.y;
    }
}

// Bias, residual, one rounding, and eight channels of an output written.
template <class T>
__device__ void finish(float (&sums)[8], T const* bias, T const* residual, T* y) {
    if (bias != nullptr) add<T>(sums, bias);
    if (residual != nullptr) add<T>(sums, residual);
    Eight16 rounded;
#pragma unroll
    for (int i = 0; i < 4; ++i) rounded.pairs[i] = packed<T>(make_float2(sums[2 * i], sums[2 * i + 1]));
    *reinterpret_cast<Eight16*>(y) = rounded;
}

// The sums of a warp leave by its own bytes of shared memory, 16 rows of 64 columns at a time.
template <class T, class Shape>
__device__ void send_tile(HopperParams const& p, char* out, TilePlace tile, int consumer,
                          float const (&sums)[Shape::kBlocks][Shape::kColumns / 2]) {
    int const thread = threadIdx.x % sm90::kWarpgroup, warp = thread / 32, lane = thread % 32;
    T* const y = static_cast<T*>(p.y.data);
    T const* const residual = static_cast<T const*>(p.residual.data);
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
        // a lane finds the place of one row
        uint32_t const first = tile.first_row + block_row(consumer, block, Shape::kBlocks) + kOutRows * warp;
        Place const place = place_of(p, first + lane % kOutRows);
        int64_t const own_y = offset_in(p.y, place.b, place.t, place.h, place.w);
        int64_t const own_residual = offset_in(p.residual, place.b, place.t, place.h, place.w);
#pragma unroll
        for (int part = 0; part < Shape::kColumns / kOutColumns; ++part) {
            int const column = tile.column_tile * Shape::kColumns + part * kOutColumns + sent_column(lane);
            if (column - sent_column(lane) >= p.O) break;
            __syncwarp();
#pragma unroll
            for (int i = 0; i < kOutColumns / 2; i += 2) {  // pairs of sums in a row
                int const row = sm90::accumulator_row(lane, i), at = sm90::accumulator_column(lane, i);
                float const* const pair = &sums[block][part * (kOutColumns / 2) + i];
                *reinterpret_cast<float2*>(out + out_offset(row, at / 4) + at % 4 * 4) = make_float2(pair[0], pair[1]);
            }
            __syncwarp();
#pragma unroll
            for (int pass = 0; pass < kOutRows / 4; ++pass) {
                int const row = sent_row(lane, pass), chunk = sent_column(lane) / 4;
                int64_t const at_y = __shfl_sync(~0u, own_y, row) + column;
                int64_t const at_residual = __shfl_sync(~0u, own_residual, row) + column;
                if (first + row >= p.positions) continue;
                auto const low = *reinterpret_cast<float4 const*>(out + out_offset(row, chunk));
                auto const high = *reinterpret_cast<float4 const*>(out + out_offset(row, chunk + 1));
                float eight[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
                finish<T>(eight, p.bias == nullptr ? nullptr : static_cast<T const*>(p.bias) + column,
                          residual == nullptr ? nullptr : residual + at_residual, y + at_y);
            }
        }
    }
}

#endif  // HUNYUAN_SM90A

template <class T, int N>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(__grid_constant__ HopperParams const p, uint32_t tiles,
                                                              uint32_t column_tiles) {
#ifdef HUNYUAN_SM90A
    using Shape = Tile<N>;
    char* const allocated = sm90::dynamic_shared();
    uint32_t const start = sm90::shared_address(allocated);
    uint32_t const skipped = (sm90::kAtomBytes - start % sm90::kAtomBytes) % sm90::kAtomBytes;
    Stages<Shape> const stages{start + skipped};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            sm90::init_barrier(stages.full(stage), sm90::kWarpgroup + 1);  // copies of each thread, and the weights
            sm90::init_barrier(stages.empty(stage), kConsumers * 4);       // a lane of each warp
        }
        sm90::fence_async_proxy();  // bulk copies arrive there too
    }
    __syncthreads();

    sm90::Ring<kStages> ring;
    int const role = __shfl_sync(~0u, int(threadIdx.x) / sm90::kWarpgroup, 0);
    if (role == 0) {
        sm90::give_registers<kProducerRegisters>();
        for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            fetch_tile<T, Shape>(p, stages, tile_place(tile, column_tiles, Shape::kRows), ring);
        }
        // stays until all that it has begun is there and read
        for (int stage = 0; stage < kStages; ++stage, ring.advance()) {
            sm90::wait(stages.empty(ring.stage), ring.phase ^ 1);
        }
    } else {
        sm90::take_registers<kConsumerRegisters>();
        int const consumer = role - 1, warp = threadIdx.x / 32 - 4;
        char* const out = allocated + skipped + Shape::kOut + warp * kOutBytes;
        for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            float sums[Shape::kBlocks][N / 2];
            multiply_tile<T, Shape>(p, stages, consumer, sums, ring);
            send_tile<T, Shape>(p, out, tile_place(tile, column_tiles, Shape::kRows), consumer, sums);
        }
    }
#else
    __trap();
#endif
}

template <class T, int N>
void launch(HopperParams const& p, void* stream) {
    using Shape = Tile<N>;
    auto const column_tiles = uint32_t(ceil_div(p.O, N));
    uint32_t const row_tiles = (p.positions + Shape::kRows - 1) / Shape::kRows, tiles = row_tiles * column_tiles;
    auto const processors = unsigned(sm90::processors());
    sm90::launch(forward_kernel<T, N>, tiles < processors ? tiles : processors, kThreads, Shape::kAllocated, stream, p,
                 tiles, column_tiles);
}

template <class T>
void run_hopper(HopperParams const& p, void* stream) {
    if (tile_columns(p.O) == 256) return launch<T, 256>(p, stream);
    launch<T, 128>(p, stream);
}

}  // namespace hunyuan_fast::causal_conv3d
