// The CUDA kernel of forward: a row stays in the registers of one block, read once and written once.
#pragma once

#include "common/cuda_check.h"
#include "fused_modulation/cuda.h"
#include "fused_modulation/row.cuh"

namespace hunyuan_fast::fused_modulation {

// T: elements of x and modulated; M: of shift and scale; V: vectors of 16 bytes of x per thread.
template <class T, class M, int V>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(ForwardParams const p) {
    constexpr int N = kPerVector<T>;
    __shared__ float2 slots[2][kMaxWarps];
    int64_t const row = blockIdx.x;
    int64_t const b = row / p.sizes.L;
    T const* const x_row = row_of<T>(p.x, b, row % p.sizes.L);
    T* const y_row = row_of<T>(p.modulated, b, row % p.sizes.L);
    int const width = int(p.sizes.E);
    float const count = float(width);

    float x[V][N];
    float sum = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        int const e = (v * blockDim.x + threadIdx.x) * N;
        if (e < width) load(x_row + e, x[v]);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (e >= width) x[v][i] = 0;
            sum += x[v][i];
        }
    }
    float const mean = block_sum(make_float2(sum, 0), slots[0]).x / count;

    float2 second = make_float2(0, 0);  // of the centred values and of their squares
#pragma unroll
    for (int v = 0; v < V; ++v) {
        bool const inside = (v * blockDim.x + threadIdx.x) * N < width;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            x[v][i] = inside ? x[v][i] - mean : 0;
            second = second + make_float2(x[v][i], x[v][i] * x[v][i]);
        }
    }
    second = block_sum(second, slots[1]);
    // What rounding the mean left over: it counts where |mean| is far above the deviation.
    float const rest = second.x / count;
    float const variance = second.y / count - rest * rest;
    float const rstd = rsqrtf((variance < 0 ? 0 : variance) + float(p.eps));

    M const* const shift_row = vector_of<M>(p.shift, b);
    M const* const scale_row = vector_of<M>(p.scale, b);
#pragma unroll
    for (int v = 0; v < V; ++v) {
        int const e = (v * blockDim.x + threadIdx.x) * N;
        if (e >= width) continue;
        float scale[N], shift[N];
        load(scale_row + e, scale);
        load(shift_row + e, shift);
#pragma unroll
        for (int i = 0; i < N; ++i) x[v][i] = (x[v][i] - rest) * rstd * (1 + scale[i]) + shift[i];
        store(y_row + e, x[v]);
    }
    if (threadIdx.x == 0) {
        p.mean[row] = mean + rest;
        p.rstd[row] = rstd;
    }
}

template <class T, class M>
void forward(ForwardParams const& p, Launch const& launch) {
    auto const stream = static_cast<cudaStream_t>(launch.stream);
    auto const blocks = unsigned(p.sizes.B * p.sizes.L);
    with_vectors<4>(launch.vectors, [&](auto v) {
        forward_kernel<T, M, decltype(v)::value><<<blocks, launch.threads, 0, stream>>>(p);
    });
    HUNYUAN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace hunyuan_fast::fused_modulation
