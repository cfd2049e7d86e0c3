// The functions of csrc/common/sm90.cuh, done by the emulated machine.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "common/sm90_layout.h"

#define HUNYUAN_SM90A 1

namespace hunyuan_fast::sm90 {

inline uint32_t shared_address(void const* pointer) { return hopper::shared_address(pointer); }
inline char* dynamic_shared() { return hopper::dynamic_shared(); }

inline void init_barrier(uint32_t barrier, int arrivals) { hopper::init_barrier(barrier, arrivals); }
inline void arrive(uint32_t barrier) { hopper::arrive(barrier, 0); }
inline void arrive_expecting(uint32_t barrier, uint32_t bytes) { hopper::arrive(barrier, bytes); }
inline void wait(uint32_t barrier, uint32_t parity) { hopper::wait(barrier, parity); }

inline void fence_async_proxy() { hopper::fence_async_proxy(); }
inline void fence_products() { hopper::fence_products(); }
inline void commit_products() { hopper::commit_products(); }

template <int Pending>
void wait_for_products() {
    static_assert(Pending >= 0 && Pending <= 7);
    hopper::wait_for_products(Pending);
}

template <int Count>
void settle(float (&)[Count]) {}

inline void sync_cluster() { hopper::sync_cluster(); }
inline void arrive_remote(uint32_t barrier, int rank) { hopper::arrive_remote(barrier, rank); }

inline void sync_named(int barrier, int threads) { hopper::sync_named(barrier, threads); }
inline void arrive_named(int barrier, int threads) { hopper::arrive_named(barrier, threads); }

inline void copy_chunk(uint32_t to, void const* from) { hopper::copy_chunk(to, from, 16); }
inline void copy_chunk(uint32_t to, void const* from, uint32_t bytes) { hopper::copy_chunk(to, from, bytes); }
inline void arrive_after_copies(uint32_t barrier) { hopper::arrive_after_copies(barrier); }
inline void copy_bulk(uint32_t to, void const* from, uint32_t bytes, uint32_t barrier) {
    hopper::copy_bulk(to, from, bytes, barrier);
}

template <int Count>
void give_registers() {
    hopper::change_registers(Count, false);
}

template <int Count>
void take_registers() {
    hopper::change_registers(Count, true);
}

inline bool elect_one() { return hopper::elect_one(); }

// The emulated machine does everything in the order of the source.
inline void compute_now(float) {}

// Results below the least normal number are flushed to zero.
inline float exp2_approx(float x) {
    float const y = std::exp2(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

template <class T>
uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return hopper::float_to_bf16(low) | uint32_t(hopper::float_to_bf16(high)) << 16;
    } else {
        static_assert(std::is_same_v<T, __half>);
        return hopper::float_to_half(low) | uint32_t(hopper::float_to_half(high)) << 16;
    }
}

inline void store_chunk(uint32_t to, uint32_t const (&a)[4]) { hopper::store_chunk(to, a); }
inline void store_matrix(uint32_t to, uint32_t const (&a)[4]) { hopper::store_matrix(to, a, false); }
inline void store_matrix_transposed(uint32_t to, uint32_t const (&a)[4]) { hopper::store_matrix(to, a, true); }

}  // namespace hunyuan_fast::sm90
