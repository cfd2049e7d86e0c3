// Norm and rotation of queries on their way to shared memory, by the warps beside the one that fetches. A row is as
// many neighbouring lanes as it has chunks of eight features.
#pragma once

#include <type_traits>

#include "rope3d_attention/sm90_fetch.cuh"

namespace hunyuan_fast::rope3d_attention {

struct ReadyQueries {};

// What a kernel is told about its queries beside what stands in HopperParams.
template <class S>
using QueriesOf = std::conditional_t<S::kRaw, RawQueries, ReadyQueries>;

#ifdef HUNYUAN_SM90A

constexpr int kRowsAhead = 2;  // of those that a lane goes through: as many are on their way from memory

// Eight features of a row as they come, and the angles of their pairs.
struct alignas(16) RawChunk {
    uint32_t pairs[4];
    float cos[4];
    float sin[4];
};

// Zeros for a row that is not there.
template <class T, class S>
__device__ RawChunk load_chunk(RawQueries const& raw, Item const& item, int row, bool given, int chunk) {
    RawChunk loaded = {};
    if (!given) return loaded;
    bool const second = row >= raw.second;
    RawRows const& rows = raw.stream[second];
    int const feature = chunk * sm90::kChunkElements, in_stream = second ? row - raw.second : row;
    T const* const from = static_cast<T const*>(rows.data) + uint32_t(item.b) * rows.stride_b +
                          int64_t(in_stream) * rows.stride_l + uint32_t(item.n * S::kFeatures + feature);
    uint4 const pairs = __ldg(reinterpret_cast<uint4 const*>(from));
    loaded.pairs[0] = pairs.x, loaded.pairs[1] = pairs.y, loaded.pairs[2] = pairs.z, loaded.pairs[3] = pairs.w;
    if (row >= raw.rotated) return loaded;
    int const angles = row * raw.stride_table + feature;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        loaded.cos[i] = __ldg(raw.cos + angles + 2 * i);
        loaded.sin[i] = __ldg(raw.sin + angles + 2 * i);
    }
    return loaded;
}

template <class T>
__device__ float2 widen(uint32_t pair) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
    } else {
        return __half22float2(*reinterpret_cast<__half2 const*>(&pair));
    }
}

// One lane's features of a row, rounded once.
template <class T, class S>
__device__ void finish_chunk(RawQueries const& raw, RawChunk const& loaded, int row, int chunk,
                             uint32_t (&pairs)[4]) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 const x = widen<T>(loaded.pairs[i]);
        squares += x.x * x.x + x.y * x.y;
    }
#pragma unroll
    for (int step = 1; step < S::kFeatures / sm90::kChunkElements; step *= 2) {
        squares += __shfl_xor_sync(~0u, squares, step);
    }
    float const rstd = rsqrtf(squares / S::kFeatures + raw.eps);
    float const* const weight = raw.stream[row >= raw.second].weight + chunk * sm90::kChunkElements;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 const x = widen<T>(loaded.pairs[i]);
        float const even = x.x * rstd * __ldg(weight + 2 * i), odd = x.y * rstd * __ldg(weight + 2 * i + 1);
        // chosen, not multiplied by an angle of zero: an infinity would become NaN in its neighbour
        bool const turned = row < raw.rotated;
        float const cos = loaded.cos[i], sin = loaded.sin[i];
        pairs[i] = sm90::pack<T>(turned ? even * cos - odd * sin : even, turned ? odd * cos + even * sin : odd);
    }
}

// One consumer's rows of an item. The first ones are fetched before there is a place for them.
template <class T, class S>
__device__ void prepare_rows(RawQueries const& raw, Shared<S> const& shared, Item const& item, int first, int valid,
                             QueryBuffer const& buffer, int warp) {
    constexpr int kChunks = S::kFeatures / sm90::kChunkElements, kStep = kPreparers * 32 / kChunks;
    int const lane = threadIdx.x % 32, chunk = copied_chunk(lane, kChunks);
    uint32_t const to = shared.queries(buffer.index) + chunk / sm90::kRowChunks * S::kQueryBlockBytes;
    int const end = first + sm90::kBlockRows;
    int row = first + copied_row(lane, warp, kChunks);
    auto const load = [&](int next) {
        return load_chunk<T, S>(raw, item, next, next < end && next < valid, chunk);
    };
    RawChunk ahead[kRowsAhead];
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) ahead[i] = load(row + i * kStep);
    sm90::wait(shared.queries_empty(buffer.index), buffer.phase ^ 1);
    __syncwarp();
#pragma unroll 1
    for (; row < end; row += kRowsAhead * kStep) {
#pragma unroll
        for (int i = 0; i < kRowsAhead; ++i) {
            int const now = row + i * kStep;
            uint32_t pairs[4];
            finish_chunk<T, S>(raw, ahead[i], now, chunk, pairs);
            uint32_t const place = sm90::chunk_offset(now % sm90::kBlockRows, chunk % sm90::kRowChunks);
            if (now < end) sm90::store_chunk(to + place, pairs);
            ahead[i] = load(now + kRowsAhead * kStep);
        }
    }
    sm90::fence_async_proxy();  // written through the generic proxy, read by products
    __syncwarp();
    if (lane == 0) sm90::arrive(shared.queries_full(buffer.index));
}

// By the warps of the producer's warpgroup that do not fetch.
template <class T, class S>
__device__ void prepare(HopperParams const& p, RawQueries const& raw, Shared<S> const& shared, uint32_t items,
                        int warp) {
    uint32_t filled = 0;  // buffers
    for (uint32_t index = blockIdx.x / S::kCluster; index < items; index += gridDim.x / S::kCluster) {
        Item const item = item_of(p, index, S::kCluster);
        int const valid = taking_part(p, item.b).queries;
        if (item.first_row >= valid) continue;
        do {
            int const first = first_query(item, shared.rank, filled % kConsumers);
            prepare_rows<T, S>(raw, shared, item, first, valid, raw_buffer<S>(filled), warp);
        } while (++filled % kConsumers != 0);
    }
}

#endif  // HUNYUAN_SM90A

}  // namespace hunyuan_fast::rope3d_attention
