// Hopper's own instructions, one function each: barriers, asynchronous copies, registers that change hands. For code
// compiled for sm_90a; sections are those of the PTX ISA 9.0. Matrix products are in sm90_products.cuh, copies of
// boxes of tensors in sm90_tensor_copy.cuh.
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

// Where the shared memory begins that a launch asked for.
__device__ inline char* dynamic_shared() {
    extern __shared__ char hunyuan_dynamic_shared[];
    return hunyuan_dynamic_shared;
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

// ---- named barriers: "barrier": of `threads` threads, whole warps, some of which wait and some need not

__device__ inline void sync_named(int barrier, int threads) {
    asm volatile("barrier.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline void arrive_named(int barrier, int threads) {
    asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// What x, which is never negative, is made of is computed before the wait that follows. Order in the source alone does
// not see to that: the assembler puts arithmetic off until the wait is over, and does nothing meanwhile.
__device__ inline void compute_now(float x) {
    if (x < 0) asm volatile("nanosleep.u32 0;" ::: "memory");
}

// ---- clusters of blocks, which see each other's shared memory: "barrier.cluster", "mapa"

// All threads of all blocks of the cluster; what they did before is seen after. Warps come together first: one in two
// parts would count twice.
__device__ inline void sync_cluster() {
    __syncwarp();
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
}

// Arrives at the barrier that lies at the same place in block `rank` of the cluster, which may be this one. It says that
// something was read. It hands nothing on that was written: release at the scope of the cluster would wait for every
// store of the thread to reach global memory.
__device__ inline void arrive_remote(uint32_t barrier, int rank) {
    asm volatile(
        "{ .reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// ---- copies: "cp.async", "cp.async.mbarrier.arrive", "cp.async.bulk"

// 16 bytes, past the first-level cache; both addresses multiples of 16.
__device__ inline void copy_chunk(uint32_t to, void const* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The first `bytes` of 16, 0 to 16 of them, and zeros after these; bytes that are not copied are not read.
__device__ inline void copy_chunk(uint32_t to, void const* from, uint32_t bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
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

// ---- warps: "elect.sync"

// True in one thread of the warp, whose threads are all here.
__device__ inline bool elect_one() {
    uint32_t elected;
    asm volatile(
        "{ .reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(elected)
        :
        : "memory");
    return elected != 0;
}

// ---- numbers: "ex2", "cvt", "st", "stmatrix"

__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers rounded to nearest, `low` in bits 0 to 15.
template <class T>
__device__ inline uint32_t pack(float low, float high) {
    uint32_t both;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    } else {
        static_assert(std::is_same_v<T, __half>);
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    }
    return both;
}

// 16 bytes, to a multiple of 16.
__device__ inline void store_chunk(uint32_t to, uint32_t const (&a)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
                 : "memory");
}

// Four matrices of 8 x 8 16-bit values, one to a register: lane l holds values 2 (l % 4) and the next of row l / 4.
// Row l % 8 of matrix l / 8 goes to the 16 bytes at lane l's address.
__device__ inline void store_matrix(uint32_t to, uint32_t const (&a)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a[0]), "r"(a[1]),
                 "r"(a[2]), "r"(a[3])
                 : "memory");
}

// Likewise, each matrix transposed: what goes to lane l's address is column l % 8 of matrix l / 8.
__device__ inline void store_matrix_transposed(uint32_t to, uint32_t const (&a)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a[0]),
                 "r"(a[1]), "r"(a[2]), "r"(a[3])
                 : "memory");
}

#endif  // HUNYUAN_SM90A

}  // namespace hunyuan_fast::sm90
