// CUDA's words for the emulated machine: qualifiers, built-in variables and functions, what hosts ask for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include "machine/machine.h"

#define CUDART_VERSION 13000
#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__ __restrict

inline hopper::Index& threadIdx = hopper::thread_index;
inline hopper::Index& blockIdx = hopper::block_index;
inline hopper::Index& blockDim = hopper::block_size;
inline hopper::Index& gridDim = hopper::grid_size;

struct dim3 : hopper::Index {
    dim3(unsigned nx = 1, unsigned ny = 1, unsigned nz = 1) : Index{nx, ny, nz} {}
};

// ---- vectors

template <class T>
struct alignas(2 * sizeof(T)) HopperTwo {
    T x, y;
};
template <class T>
struct alignas(16) HopperFour {
    T x, y, z, w;
};
using float2 = HopperTwo<float>;
using int2 = HopperTwo<int>;
using uint2 = HopperTwo<unsigned>;
using float4 = HopperFour<float>;
using int4 = HopperFour<int>;
using uint4 = HopperFour<unsigned>;

inline float2 make_float2(float x, float y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- threads together

inline void __syncthreads() { hopper::sync_block(); }
inline void __syncwarp(unsigned lanes = ~0u) { hopper::sync_warp(lanes); }

namespace hopper {

template <class To, class From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class T>
T exchanged(unsigned lanes, T value, int from_lane) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = exchange(lanes, bits, from_lane);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline int own_lane() {
    return int(thread_index.x + block_size.x * (thread_index.y + block_size.y * thread_index.z)) % 32;
}

}  // namespace hopper

template <class T>
T __shfl_sync(unsigned lanes, T value, int lane, int width = 32) {
    int const own = hopper::own_lane();
    return hopper::exchanged(lanes, value, own / width * width + (lane & (width - 1)));
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int mask, int width = 32) {
    int const own = hopper::own_lane(), from = own ^ mask;
    return hopper::exchanged(lanes, value, from / width > own / width ? own : from);
}

template <class T>
T __shfl_down_sync(unsigned lanes, T value, int by, int width = 32) {
    int const own = hopper::own_lane();
    return hopper::exchanged(lanes, value, own % width + by < width ? own + by : own);
}

template <class T>
T __shfl_up_sync(unsigned lanes, T value, int by, int width = 32) {
    int const own = hopper::own_lane();
    return hopper::exchanged(lanes, value, own % width >= by ? own - by : own);
}

inline unsigned __ballot_sync(unsigned lanes, int value) { return hopper::ballot(lanes, value != 0); }
inline int __any_sync(unsigned lanes, int value) { return hopper::ballot(lanes, value != 0) != 0; }
inline int __all_sync(unsigned lanes, int value) { return hopper::ballot(lanes, value == 0) == 0; }

// No thread runs while another is between these.
inline float atomicAdd(float* to, float value) { return std::exchange(*to, *to + value); }
inline int atomicAdd(int* to, int value) { return std::exchange(*to, *to + value); }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return std::exchange(*to, *to + value); }

[[noreturn]] inline void __trap() { hopper::fail("__trap"); }

// ---- numbers

using std::max;
using std::min;

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) { return hopper::same_bits<unsigned>(x); }
inline int __float_as_int(float x) { return hopper::same_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return hopper::same_bits<float>(x); }
inline float __int_as_float(int x) { return hopper::same_bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
template <class T>
T __ldg(T const* from) {
    return *from;
}

// ---- what hosts ask for

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = struct HopperStream*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr unsigned long long cudaEnableDefault = 0;

inline char const* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    return *value = hopper::processors(), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
    return std::memset(to, value, bytes), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
    return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaGetDriverEntryPointByVersion(char const* name, void** found, unsigned version, unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result);
