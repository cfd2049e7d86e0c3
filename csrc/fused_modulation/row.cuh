// A row in the registers of one block: 16-byte accesses, block-wide sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "fused_modulation/params.h"

namespace hunyuan_fast::fused_modulation {

// A row of 8192 in registers needs up to 128 of them in each of 512 threads.
constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / 32;

template <class T>
constexpr int kPerVector = 16 / int(sizeof(T));

template <class T>
inline __device__ T* row_of(Rows const& rows, int64_t b, int64_t l) {
    return static_cast<T*>(rows.data) + b * rows.stride_b + l * rows.stride_l;
}

template <class M>
inline __device__ M const* vector_of(Vectors const& vectors, int64_t b) {
    return static_cast<M const*>(vectors.data) + b * vectors.stride_b;
}

inline __device__ float2 widen(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
inline __device__ float2 widen(__half2 pair) { return __half22float2(pair); }
inline __device__ void narrow(float a, float b, __nv_bfloat162& pair) { pair = __floats2bfloat162_rn(a, b); }
inline __device__ void narrow(float a, float b, __half2& pair) { pair = __floats2half2_rn(a, b); }

template <class T>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
    using type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
    using type = __half2;
};

// kCount values from 16-byte aligned memory, as floats.
template <int kCount>
inline __device__ void load(float const* p, float (&v)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
        float4 const four = *reinterpret_cast<float4 const*>(p + i);
        v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
}

template <class T, int kCount>
inline __device__ void load(T const* p, float (&v)[kCount]) {
    using Pair = typename PairOf<T>::type;
    static_assert(kCount == 8, "one 16-byte access");
    uint4 const raw = *reinterpret_cast<uint4 const*>(p);
    Pair const* pairs = reinterpret_cast<Pair const*>(&raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 const two = widen(pairs[i]);
        v[2 * i] = two.x, v[2 * i + 1] = two.y;
    }
}

template <int kCount>
inline __device__ void store(float* p, float const (&v)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
        *reinterpret_cast<float4*>(p + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    }
}

template <class T, int kCount>
inline __device__ void store(T* p, float const (&v)[kCount]) {
    using Pair = typename PairOf<T>::type;
    static_assert(kCount == 8, "one 16-byte access");
    uint4 raw;
    Pair* pairs = reinterpret_cast<Pair*>(&raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) narrow(v[2 * i], v[2 * i + 1], pairs[i]);
    *reinterpret_cast<uint4*>(p) = raw;
}

inline __device__ float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }

// The sum over all threads of a block, in the same order in every thread. `slots` holds one value per
// warp and belongs to this sum alone until the next barrier.
inline __device__ float2 block_sum(float2 value, float2* slots) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        float const x = __shfl_xor_sync(~0u, value.x, offset);
        float const y = __shfl_xor_sync(~0u, value.y, offset);
        value = value + make_float2(x, y);
    }
    int const warps = blockDim.x / 32;
    if (warps == 1) return value;
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = value;
    __syncthreads();
    float2 total = slots[0];
    for (int warp = 1; warp < warps; ++warp) total = total + slots[warp];
    return total;
}

template <int V>
struct Vectors16 {
    static constexpr int value = V;
};

// Calls launch(Vectors16<V>{}): the number of 16-byte vectors per thread as a compile-time constant.
template <int kMax, class F>
void with_vectors(int vectors, F launch) {
    if constexpr (kMax > 1) {
        if (vectors < kMax) return with_vectors<kMax - 1>(vectors, launch);
    }
    launch(Vectors16<kMax>{});
}

}  // namespace hunyuan_fast::fused_modulation
