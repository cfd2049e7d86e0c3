// Attention over a head, compiled once per instruction set by cpu_<isa>.cpp.
#pragma once

#include "rope3d_attention/cpu.h"
#include "rope3d_attention/cpu_backward.h"

namespace hunyuan_fast::rope3d_attention::HUNYUAN_FAST_ISA {

// Found by trying, on a core with 1 MB; wider heads leave room for fewer tokens.
inline int64_t shrunk(int64_t tokens, int64_t D) {
    if (D <= kTunedFor) return tokens;
    int64_t const fitting = tokens * kTunedFor / D / kRows * kRows;
    return fitting > kRows ? fitting : kRows;
}

template <class T>
Tiles forward_tiles(int64_t D) {
    return {shrunk(384, D), 192};
}

template <class T>
Tiles backward_tiles(int64_t D) {
    return {shrunk(96, D), shrunk(192, D)};
}

template <class T>
constexpr CpuKernels kKernels = {&forward_tiles<T>, &backward_tiles<T>, &forward_room<T>, &backward_room<T>,
                                 &shared_floats<T>, &forward<T>,       &backward<T>};

inline CpuKernels const& kernels_of(DType dtype) {
    switch (dtype) {
        case DType::bf16: return kKernels<BFloat16>;
        case DType::f16: return kKernels<Float16>;
        default: return kKernels<Float32>;
    }
}

}  // namespace hunyuan_fast::rope3d_attention::HUNYUAN_FAST_ISA
