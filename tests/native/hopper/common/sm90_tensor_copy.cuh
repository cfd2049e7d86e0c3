// The functions of csrc/common/sm90_tensor_copy.cuh, done by the emulated machine.
#pragma once

#include "common/sm90.cuh"
#include "common/sm90_tensor_map.h"

namespace hunyuan_fast::sm90 {

inline void prefetch_map(TensorMap const& map) { hopper::prefetch_map(&map); }

inline void copy_tensor(uint32_t to, TensorMap const& map, int c0, int c1, int c2, int c3, uint32_t barrier) {
    hopper::copy_tensor(to, &map, {c0, c1, c2, c3}, barrier);
}

inline void copy_tensor_to_cluster(uint32_t to, TensorMap const& map, int c0, int c1, int c2, int c3, uint32_t barrier,
                                   uint16_t blocks) {
    hopper::copy_tensor_to_cluster(to, &map, {c0, c1, c2, c3}, barrier, blocks);
}

inline void store_tensor(TensorMap const& map, uint32_t from, int c0, int c1, int c2, int c3) {
    hopper::store_tensor(&map, from, {c0, c1, c2, c3});
}

inline void reduce_add(float* to, uint32_t from, uint32_t bytes) { hopper::reduce_add(to, from, bytes); }
inline void commit_stores() { hopper::commit_stores(); }

template <int Pending>
void wait_for_stores() {
    hopper::wait_for_stores(Pending, false);
}

template <int Pending>
void wait_for_store_reads() {
    hopper::wait_for_stores(Pending, true);
}

}  // namespace hunyuan_fast::sm90
