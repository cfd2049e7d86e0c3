// Hopper's own instructions, one function each: barriers in shared memory, asynchronous copies, matrix products of a
// warpgroup. For code compiled for sm_90a; sections are those of the PTX ISA 9.0.
//
// Who sees what. wgmma and cp.async.bulk are of the asynchronous proxy, everything else here, cp.async too, of the
// generic one ("Async proxy"). Where one writes and the other reads, a proxy fence must lie on the way between them
// ("Causality order": along the base causality path, in the block of the access that is not generic). So a consumer
// that has waited for data of cp.async fences before its wgmma. A finished wgmma is fenced by itself.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/sm90_layout.h"

// Defined where the instructions exist; a kernel for other targets compiles to a trap.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HUNYUAN_SM90A 1
#endif

namespace hunyuan_fast::sm90 {

__device__ inline uint32_t shared_address(void const* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#ifdef HUNYUAN_SM90A

// ---- barriers: "Parallel Synchronization and Communication Instructions: mbarrier"

__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase wait for that many bytes of bulk copies.
__device__ inline void arrive_expecting(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity is over. Before the first phase that of parity 1 is.
__device__ inline void wait(uint32_t barrier, uint32_t parity) {
    uint32_t over;
    do {
        asm volatile(
            "{ .reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p; }"
            : "=r"(over)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!over);
}

// ---- order: "membar / fence", "wgmma.fence"

// What this thread knows of shared memory is what the asynchronous proxy sees from here on.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product, and after registers of one were touched otherwise.
__device__ inline void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most Pending groups of this warpgroup are unfinished.
template <int Pending>
__device__ inline void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keeps the compiler from reading sums before the wait that stands above.
template <int Count>
__device__ inline void settle(float (&d)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// ---- copies: "cp.async", "cp.async.mbarrier.arrive", "cp.async.bulk"

// 16 bytes, past the first-level cache; both addresses multiples of 16.
__device__ inline void copy_chunk(uint32_t to, void const* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// An arrival as soon as all copies that this thread has begun are done; it counts among those the barrier expects.
__device__ inline void arrive_after_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// One thread copies a run of bytes, a multiple of 16; the barrier is told of every byte.
__device__ inline void copy_bulk(uint32_t to, void const* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// ---- registers: "setmaxnreg", by all warps of a warpgroup

template <int Count>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

template <int Count>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// ---- products: "wgmma.mma_async", operands from shared memory, both K-major, sums in fp32

#define HUNYUAN_FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HUNYUAN_SIXTEEN(d, i) \
    HUNYUAN_FOUR(d, i), HUNYUAN_FOUR(d, i + 4), HUNYUAN_FOUR(d, i + 8), HUNYUAN_FOUR(d, i + 12)

#define HUNYUAN_WGMMA_128(type) \
    asm volatile( \
    "{ .reg .pred p; setp.ne.b32 p, %66, 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15," \
    " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31," \
    " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47," \
    " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
    "%64, %65, p, 1, 1, 0, 0; }" \
        : HUNYUAN_SIXTEEN(d, 0), HUNYUAN_SIXTEEN(d, 16), HUNYUAN_SIXTEEN(d, 32), HUNYUAN_SIXTEEN(d, 48) \
        : "l"(a), "l"(b), "r"(accumulate))

#define HUNYUAN_WGMMA_256(type) \
    asm volatile( \
    "{ .reg .pred p; setp.ne.b32 p, %130, 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " " \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15," \
    " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31," \
    " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47," \
    " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63," \
    " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79," \
    " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95," \
    " %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111," \
    " %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
    "%128, %129, p, 1, 1, 0, 0; }" \
        : HUNYUAN_SIXTEEN(d, 0), HUNYUAN_SIXTEEN(d, 16), HUNYUAN_SIXTEEN(d, 32), HUNYUAN_SIXTEEN(d, 48), \
          HUNYUAN_SIXTEEN(d, 64), HUNYUAN_SIXTEEN(d, 80), HUNYUAN_SIXTEEN(d, 96), HUNYUAN_SIXTEEN(d, 112) \
        : "l"(a), "l"(b), "r"(accumulate))

// d (64 x N) = a (64 x 16) b (N x 16)^T, plus d where accumulate is not 0; a and b are descriptors. The products of a
// warpgroup are done in order, at some time before a wait.
template <class T, int N>
__device__ inline void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    static_assert(N == 128 || N == 256);
    static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
    constexpr bool kBrain = std::is_same_v<T, __nv_bfloat16>;
    if constexpr (N == 128 && kBrain) HUNYUAN_WGMMA_128("bf16");
    if constexpr (N == 128 && !kBrain) HUNYUAN_WGMMA_128("f16");
    if constexpr (N == 256 && kBrain) HUNYUAN_WGMMA_256("bf16");
    if constexpr (N == 256 && !kBrain) HUNYUAN_WGMMA_256("f16");
}

#undef HUNYUAN_WGMMA_128
#undef HUNYUAN_WGMMA_256
#undef HUNYUAN_SIXTEEN
#undef HUNYUAN_FOUR

#endif  // HUNYUAN_SM90A

}  // namespace hunyuan_fast::sm90
