// Blocks of a launch that work on one place in global memory one after the other, in an order of their numbers.
//
// A block takes its number when it starts, so whoever has a smaller one has started too: waiting for such blocks ends,
// however many of them the device runs at a time.
#pragma once

#include "common/sm90.cuh"

namespace hunyuan_fast::sm90 {

#ifdef HUNYUAN_SM90A

__device__ inline int take_ticket(int* counter) { return atomicAdd(counter, 1); }

// Until somebody has written this value; what they did before is then seen by this thread, and by copies and
// reductions that it begins ("Async proxy": the fence).
__device__ inline void wait_for_turn(int const* turn, int value) {
    int now;
    do {
        asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
    } while (now != value);
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// After wait_for_stores<0>: reductions of this thread are done before the next one's begin.
__device__ inline void pass_turn(int* turn, int next) {
    asm volatile("fence.proxy.async.global;" ::: "memory");
    asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(turn), "r"(next) : "memory");
}

#endif  // HUNYUAN_SM90A

}  // namespace hunyuan_fast::sm90
