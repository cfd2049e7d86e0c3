// Copies of boxes of tensors between global and shared memory, by one thread: "cp.async.bulk.tensor" and
// "cp.reduce.async.bulk" of the PTX ISA 9.0. Addresses in shared memory are multiples of 128, of 1024 where swizzled.
#pragma once

#include "common/sm90.cuh"
#include "common/sm90_tensor_map.h"

namespace hunyuan_fast::sm90 {

#ifdef HUNYUAN_SM90A

__device__ inline void prefetch_map(TensorMap const& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box at these coordinates; the barrier is told of all its bytes, those outside the tensor too.
__device__ inline void copy_tensor(uint32_t to, TensorMap const& map, int c0, int c1, int c2, int c3,
                                   uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
        "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
        : "memory");
}

// To the same place in every block of the cluster whose bit is set; the barrier of each at that place is told.
__device__ inline void copy_tensor_to_cluster(uint32_t to, TensorMap const& map, int c0, int c1, int c2, int c3,
                                              uint32_t barrier, uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
        "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier), "h"(blocks)
        : "memory");
}

// ---- the other way, in groups that the thread can wait for

// What plain stores wrote to shared memory must have been fenced (fence_async_proxy) before.
__device__ inline void store_tensor(TensorMap const& map, uint32_t from, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
                 "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(from)
                 : "memory");
}

// Adds fp32 numbers to those in global memory; both addresses and the bytes are multiples of 16. Numbers and sums below
// the least normal one count as zeros.
__device__ inline void reduce_add(float* to, uint32_t from, uint32_t bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(bytes)
                 : "memory");
}

__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most Pending groups of this thread are unfinished.
template <int Pending>
__device__ inline void wait_for_stores() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}

// Until at most Pending groups of this thread still read shared memory.
template <int Pending>
__device__ inline void wait_for_store_reads() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

#endif  // HUNYUAN_SM90A

}  // namespace hunyuan_fast::sm90
