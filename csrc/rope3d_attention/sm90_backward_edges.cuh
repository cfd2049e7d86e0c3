// What lies before and after the products of attention's backward pass: numbers of each query, the incomplete tiles at
// the end of a sequence, zeros past it; and dq from its sums. Both read and write memory once.
#pragma once

#include "common/sm90.cuh"
#include "rope3d_attention/sm90_backward.h"
#include "rope3d_attention/sm90_softmax.cuh"

namespace hunyuan_fast::rope3d_attention {

constexpr int kEdgeThreads = 256;

struct alignas(16) Sixteen {
    uint32_t words[4];
};

#ifdef HUNYUAN_SM90A

// Eight values of a row, or the place for them.
template <class T>
__device__ T* chunk_of(Rows const& rows, int64_t batch, int64_t row, int64_t head, int chunk) {
    return static_cast<T*>(rows.data) + batch * rows.stride_b + row * rows.stride_l + head * rows.stride_n +
           chunk * sm90::kChunkElements;
}

template <class T>
__device__ float2 unpacked(uint32_t pair) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __bfloat1622float2(reinterpret_cast<__nv_bfloat162 const&>(pair));
    } else {
        return __half22float2(reinterpret_cast<__half2 const&>(pair));
    }
}

__device__ inline TakingPart taking_part(BackwardParams const& p, int batch) {
    return taking_part(p.lengths, p.queries, batch, p.keys, p.L);
}

// `rows` rows from `first` on, as a tile lies in shared memory; zeros from row `valid` on.
template <class T, int Features>
__device__ void write_tile(char* to, Rows const& from, int batch, int head, int first, int rows, int valid) {
    constexpr int kChunks = Features / sm90::kChunkElements;
    for (int i = threadIdx.x; i < rows * kChunks; i += kEdgeThreads) {
        int const row = i / kChunks, chunk = i % kChunks;
        Sixteen values{};
        if (first + row < valid) {
            values = *reinterpret_cast<Sixteen const*>(chunk_of<T>(from, batch, first + row, head, chunk));
        }
        int const block = chunk / sm90::kRowChunks * rows * sm90::kRowBytes;
        *reinterpret_cast<Sixteen*>(to + block + sm90::chunk_offset(row, chunk % sm90::kRowChunks)) = values;
    }
}

// The sum over a row of dout * out, shared by `kChunks` neighbouring lanes.
template <class T, int Features>
__device__ float delta_of(BackwardParams const& p, int batch, int row, int head, int chunk, int valid) {
    float sum = 0;
    if (row < valid) {
        auto const a = *reinterpret_cast<Sixteen const*>(chunk_of<T>(p.dout, batch, row, head, chunk));
        auto const b = *reinterpret_cast<Sixteen const*>(chunk_of<T>(p.out, batch, row, head, chunk));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 const x = unpacked<T>(a.words[i]), y = unpacked<T>(b.words[i]);
            sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
        }
    }
#pragma unroll
    for (int lanes = Features / sm90::kChunkElements / 2; lanes > 0; lanes /= 2) {
        sum += __shfl_xor_sync(~0u, sum, lanes);
    }
    return sum;
}

// A block of the kernels here has one query tile of one sequence.
template <int Features>
struct EdgePlace {
    static constexpr int kQueries = BackwardTile<Features>::kQueries;

    int64_t at = blockIdx.x;  // among all tiles of all sequences
    int tile;
    int64_t sequence;
    int head;
    int batch;
    int first;                // row
    TakingPart valid;         // rows of the sample

    __device__ explicit EdgePlace(BackwardParams const& p) {
        int const tiles = ceil_div(p.L, kQueries);
        tile = int(at % tiles), sequence = at / tiles;
        head = int(sequence % p.N), batch = int(sequence / p.N);
        first = tile * kQueries, valid = taking_part(p, batch);
    }
};

template <class T, int Features>
__device__ void write_edges(char* edge, BackwardParams const& p, EdgePlace<Features> const& place) {
    using Tile = BackwardTile<Features>;
    int const batch = place.batch, head = place.head, queries = place.valid.queries, keys = place.valid.keys;
    int const query = queries / Tile::kQueries * Tile::kQueries, key = keys / kBackwardKeys * kBackwardKeys;
    write_tile<T, Features>(edge + Tile::kEdgeQueriesAt, p.q, batch, head, query, Tile::kQueries, queries);
    write_tile<T, Features>(edge + Tile::kEdgeDoutAt, p.dout, batch, head, query, Tile::kQueries, queries);
    write_tile<T, Features>(edge + Tile::kEdgeKeysAt, p.k, batch, head, key, kBackwardKeys, keys);
    write_tile<T, Features>(edge + Tile::kEdgeValuesAt, p.v, batch, head, key, kBackwardKeys, keys);
}

// Zeros for rows that take no part, of which this block has every `stride`-th tile of rows from its own on.
template <class T, int Features>
__device__ void clear_padding(Rows const& gradient, EdgePlace<Features> const& place, int valid, int rows, int stride) {
    constexpr int kChunks = Features / sm90::kChunkElements, kQueries = EdgePlace<Features>::kQueries;
    for (int tile = place.tile; tile * int64_t(kQueries) < rows; tile += stride) {
        for (int i = threadIdx.x; i < kQueries * kChunks; i += kEdgeThreads) {
            int const row = tile * kQueries + i / kChunks;
            if (row >= valid && row < rows) {
                *reinterpret_cast<Sixteen*>(chunk_of<T>(gradient, place.batch, row, place.head, i % kChunks)) =
                    Sixteen{};
            }
        }
    }
}

#endif  // HUNYUAN_SM90A

template <class T, int Features>
__global__ void __launch_bounds__(kEdgeThreads) prepare_kernel(__grid_constant__ BackwardParams const p) {
#ifdef HUNYUAN_SM90A
    using Tile = BackwardTile<Features>;
    constexpr int kChunks = Features / sm90::kChunkElements;
    int const thread = threadIdx.x;
    EdgePlace<Features> const place(p);
    int64_t const at = place.at;
    auto const w = backward_workspace<Features>(int64_t(p.B) * p.N, p.L);
    char* const space = static_cast<char*>(p.workspace);
    auto* const lse = reinterpret_cast<float*>(space + w.lse) + at * Tile::kQueries;
    auto* const delta = reinterpret_cast<float*>(space + w.delta) + at * Tile::kQueries;
    for (int row = thread / kChunks; row < Tile::kQueries; row += kEdgeThreads / kChunks) {
        int const query = place.first + row, chunk = thread % kChunks;
        float const sum = delta_of<T, Features>(p, place.batch, query, place.head, chunk, place.valid.queries);
        if (chunk == 0) {
            float const known = query < place.valid.queries ? p.lse[place.sequence * p.L + query] : -infinity();
            // a row that has seen no key has no probabilities
            lse[row] = known == -infinity() ? infinity() : known * kLog2E;
            delta[row] = sum;
        }
    }
    int const tiles = ceil_div(p.L, Tile::kQueries);
    clear_padding<T, Features>(p.dq, place, place.valid.queries, p.L, tiles);
    clear_padding<T, Features>(p.dk, place, place.valid.keys, p.keys, tiles);
    clear_padding<T, Features>(p.dv, place, place.valid.keys, p.keys, tiles);
    if (place.first < place.valid.queries) {
        auto* const sums = reinterpret_cast<Sixteen*>(space + w.sums) + at * (Tile::kSums / 4);
        for (int i = thread; i < Tile::kSums / 4; i += kEdgeThreads) sums[i] = Sixteen{};
        if (thread == 0) reinterpret_cast<int*>(space + w.turns)[at] = 0;
    }
    if (thread == 0 && at == 0) *reinterpret_cast<int*>(space + w.ticket) = 0;
    if (place.tile == 0) {
        write_edges<T, Features>(space + w.edges + place.sequence * Tile::kEdgeBytes, p, place);
    }
#else
    __trap();
#endif
}

// Columns of shared memory between rows of a tile of dq: threads that write together find different banks.
template <int Features>
constexpr int kFinishColumns = Features + 4;

// dq from the order of its sums to rows, rounded.
template <class T, int Features>
__global__ void __launch_bounds__(kEdgeThreads) finish_kernel(__grid_constant__ BackwardParams const p) {
#ifdef HUNYUAN_SM90A
    using Tile = BackwardTile<Features>;
    static_assert(kEdgeThreads == kBackwardConsumers * sm90::kWarpgroup);
    constexpr int kColumns = kFinishColumns<Features>, kChunks = Features / sm90::kChunkElements;
    EdgePlace<Features> const place(p);
    if (place.first >= place.valid.queries) return;
    auto const w = backward_workspace<Features>(int64_t(p.B) * p.N, p.L);
    auto const* const sums =
        reinterpret_cast<float const*>(static_cast<char*>(p.workspace) + w.sums) + place.at * Tile::kSums;
    auto* const rows = reinterpret_cast<float*>(sm90::dynamic_shared());
    int const consumer = threadIdx.x / sm90::kWarpgroup, thread = threadIdx.x % sm90::kWarpgroup;
#pragma unroll
    for (int quad = 0; quad < Tile::kSumQuads; ++quad) {
        auto const four = *reinterpret_cast<float4 const*>(sums + backward_sum_at<Features>(consumer, quad, thread));
        float const values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            rows[backward_sum_query<Features>(consumer, quad, thread, e) * kColumns +
                 backward_sum_feature<Features>(consumer, quad, thread, e)] = p.scale * values[e];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < Tile::kQueries * kChunks; i += kEdgeThreads) {
        int const row = i / kChunks, chunk = i % kChunks;
        if (place.first + row >= place.valid.queries) break;
        float const* const eight = rows + row * kColumns + chunk * sm90::kChunkElements;
        Sixteen rounded;
#pragma unroll
        for (int j = 0; j < 4; ++j) rounded.words[j] = sm90::pack<T>(eight[2 * j], eight[2 * j + 1]);
        *reinterpret_cast<Sixteen*>(chunk_of<T>(p.dq, place.batch, place.first + row, place.head, chunk)) = rounded;
    }
#else
    __trap();
#endif
}

}  // namespace hunyuan_fast::rope3d_attention
