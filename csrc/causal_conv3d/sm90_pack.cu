// Weights in the order in which the Hopper kernel fetches them, sums of taps made in fp32 and rounded once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "causal_conv3d/sm90_layout.h"
#include "common/sm90_launch.cuh"

namespace hunyuan_fast::causal_conv3d {
namespace {

constexpr int kPackThreads = 256;

// A thread makes one chunk: of eight channels the sums of the taps that a tap of the packed kernel stands for.
template <class T>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(__grid_constant__ HopperWeights const w, uint4* packed,
                                                            int64_t chunks, int columns) {
    int64_t const n = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
    if (n >= chunks) return;
    PackedChunk const chunk = packed_chunk(n, w.C, w.kernel, columns);
    float sums[sm90::kChunkElements] = {};
    if (chunk.output < w.O) {
        auto const* const first = static_cast<T const*>(w.data) + chunk.output * w.stride_o + chunk.channel * w.stride_c;
        auto const t = w.spans[0][chunk.tap.t], h = w.spans[1][chunk.tap.h], v = w.spans[2][chunk.tap.w];
        for (int i = t.begin; i < t.end; ++i)
            for (int j = h.begin; j < h.end; ++j)
                for (int k = v.begin; k < v.end; ++k) {
                    T const* const tap = first + i * w.strides[0] + j * w.strides[1] + k * w.strides[2];
#pragma unroll
                    for (int c = 0; c < sm90::kChunkElements; ++c) sums[c] += float(tap[c * w.stride_c]);
                }
    }
    alignas(16) T values[sm90::kChunkElements];
#pragma unroll
    for (int c = 0; c < sm90::kChunkElements; ++c) values[c] = T(sums[c]);
    packed[n] = *reinterpret_cast<uint4 const*>(values);
}

template <class T>
void pack(HopperWeights const& w, void* packed, void* stream) {
    int const columns = tile_columns(w.O);
    int64_t const chunks = packed_size(w.O, w.C, w.kernel) / sm90::kChunkElements;
    auto const blocks = unsigned((chunks + kPackThreads - 1) / kPackThreads);
    sm90::launch(pack_kernel<T>, blocks, kPackThreads, 0, stream, w, static_cast<uint4*>(packed), chunks, columns);
}

}  // namespace

void pack_hopper_bf16(HopperWeights const& weights, void* packed, void* stream) {
    pack<__nv_bfloat16>(weights, packed, stream);
}

void pack_hopper_f16(HopperWeights const& weights, void* packed, void* stream) { pack<__half>(weights, packed, stream); }

}  // namespace hunyuan_fast::causal_conv3d
