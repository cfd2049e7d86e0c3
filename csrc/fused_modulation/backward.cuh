// The CUDA kernels of backward: one block per chunk of rows, a row in its registers, read once and
// written once; then one kernel adds up the chunks.
#pragma once

#include "common/cuda_check.h"
#include "fused_modulation/cuda.h"
#include "fused_modulation/row.cuh"

namespace hunyuan_fast::fused_modulation {

// One block per chunk of rows; dshift and dscale of the chunk are summed in registers.
template <class T, class M, int V>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(BackwardParams const p) {
    constexpr int N = kPerVector<T>;
    __shared__ float2 slots[2][kMaxWarps];
    int64_t const b = blockIdx.x / p.chunks;
    int64_t const first = (blockIdx.x % p.chunks) * p.chunk_rows;
    int64_t const last = first + p.chunk_rows < p.sizes.L ? first + p.chunk_rows : p.sizes.L;
    int const width = int(p.sizes.E);
    float const inverse = 1.0f / float(width);

    float dshift[V][N] = {}, dscale[V][N] = {};
    for (int64_t l = first; l < last; ++l) {
        float const mean = p.mean[b * p.sizes.L + l];
        float const rstd = p.rstd[b * p.sizes.L + l];
        float g[V][N], normed[V][N];
        float2 sums = make_float2(0, 0);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            int const e = (v * blockDim.x + threadIdx.x) * N;
            bool const inside = e < width;
            float scale[N];
            if (inside) {
                load(row_of<T>(p.dmodulated, b, l) + e, g[v]);
                load(row_of<T>(p.residual, b, l) + e, normed[v]);
                // Read again for every row, from the first-level cache: registers are dearer.
                load(vector_of<M>(p.scale, b) + e, scale);
            }
#pragma unroll
            for (int i = 0; i < N; ++i) {
                normed[v][i] = inside ? (normed[v][i] - mean) * rstd : 0;
                float const dy = inside ? g[v][i] : 0;
                dshift[v][i] += dy;
                dscale[v][i] += dy * normed[v][i];
                g[v][i] = inside ? dy * (1 + scale[i]) : 0;
                sums = sums + make_float2(g[v][i], g[v][i] * normed[v][i]);
            }
        }
        // Two sets of slots in turn: a fast warp may be one row ahead, never two.
        sums = block_sum(sums, slots[l & 1]);
        float const mean_g = sums.x * inverse, mean_gn = sums.y * inverse;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            int const e = (v * blockDim.x + threadIdx.x) * N;
            if (e >= width) continue;
#pragma unroll
            for (int i = 0; i < N; ++i) g[v][i] = (g[v][i] - mean_g - normed[v][i] * mean_gn) * rstd;
            store(row_of<T>(p.dx, b, l) + e, g[v]);
        }
    }

    float* const partial = p.partials + int64_t(blockIdx.x) * 2 * p.sizes.E;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        int const e = (v * blockDim.x + threadIdx.x) * N;
        if (e >= width) continue;
        store(partial + e, dshift[v]);
        store(partial + width + e, dscale[v]);
    }
}

// More would spill: at 512 threads there are 128 registers for each.
template <class T>
constexpr int kMaxVectors = sizeof(T) == 2 ? 2 : 3;

constexpr int kReduceColumns = 32, kReduceSlices = 16;

// partials (B, chunks, 2, 1, E) to dshift and dscale (B, E): a slice adds every 16th chunk in order, then
// the slices are added in order.
static __global__ void reduce_kernel(BackwardParams const p) {
    __shared__ float sums[kReduceSlices][kReduceColumns];
    int64_t const columns = 2 * p.sizes.E;
    int64_t const blocks = (columns + kReduceColumns - 1) / kReduceColumns;
    int64_t const b = blockIdx.x / blocks;
    int64_t const column = (blockIdx.x % blocks) * kReduceColumns + threadIdx.x;
    float sum = 0;
    if (column < columns) {
#pragma unroll 4
        for (int64_t chunk = threadIdx.y; chunk < p.chunks; chunk += kReduceSlices) {
            sum += p.partials[(b * p.chunks + chunk) * columns + column];
        }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || column >= columns) return;
    for (int slice = 1; slice < kReduceSlices; ++slice) sum += sums[slice][threadIdx.x];
    float* const out = static_cast<float*>(column < p.sizes.E ? p.dshift : p.dscale);
    out[b * p.sizes.E + column % p.sizes.E] = sum;
}

template <class T, class M>
void backward(BackwardParams const& p, Launch const& launch) {
    auto const stream = static_cast<cudaStream_t>(launch.stream);
    auto const blocks = unsigned(p.sizes.B * p.chunks);
    with_vectors<kMaxVectors<T>>(launch.vectors, [&](auto v) {
        backward_kernel<T, M, decltype(v)::value><<<blocks, launch.threads, 0, stream>>>(p);
    });
    HUNYUAN_CUDA_CHECK(cudaGetLastError());
    auto const columns = (2 * p.sizes.E + kReduceColumns - 1) / kReduceColumns;
    reduce_kernel<<<unsigned(p.sizes.B * columns), dim3(kReduceColumns, kReduceSlices), 0, stream>>>(p);
    HUNYUAN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace hunyuan_fast::fused_modulation
