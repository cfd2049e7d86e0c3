// Attention over a head, compiled once per instruction set by cpu_<isa>.cpp.
#pragma once

#include "rope3d_attention/cpu.h"
#include "rope3d_attention/cpu_backward.h"

namespace hunyuan_fast::rope3d_attention::HUNYUAN_FAST_ISA {

template <class T>
constexpr CpuKernels kKernels = {
    192, 128 * kPerWord<T>, 96, 128 * kPerWord<T>, [](int64_t D) { return round_up(D, kLanes); },
    &forward_room<T>, &backward_room<T>, &forward<T>, &backward<T>};

inline CpuKernels const& kernels_of(DType dtype) {
    switch (dtype) {
        case DType::bf16: return kKernels<BFloat16>;
        case DType::f16: return kKernels<Float16>;
        default: return kKernels<Float32>;
    }
}

}  // namespace hunyuan_fast::rope3d_attention::HUNYUAN_FAST_ISA
