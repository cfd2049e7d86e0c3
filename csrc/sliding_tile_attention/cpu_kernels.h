// Attention of a block of tokens that see the same, compiled once per instruction set by cpu_<isa>.cpp.
#pragma once

#include "rope3d_attention/cpu_kernels.h"
#include "sliding_tile_attention/cpu.h"

namespace hunyuan_fast::sliding_tile_attention::HUNYUAN_FAST_ISA {

using namespace hunyuan_fast::rope3d_attention::HUNYUAN_FAST_ISA;
using rope3d_attention::Heads;

// Tokens of a head by their numbers.
template <class T>
inline Tokens<T> tokens_at(Heads const& x, Block const& block, int64_t const* index, int64_t count, int64_t D) {
    return {head_of<T>(x, block.b, block.n, 0), x.stride_l, count, D, index};
}

template <class T>
inline void scatter(ForwardParams const& p, Block const& block, float const* out, int64_t row, float scale,
                    Running const& running) {
    float* const lse = p.lse + (block.b * p.sizes.N + block.n) * p.sizes.L;
    for (int64_t i = 0; i < block.count; ++i, out += row) {
        double const sum = sum_lanes(load_as<Vec>(running.sums + i * kLanes));
        lse[block.queries[i]] = float(double(running.highest[i]) * double(scale) + __builtin_log(sum));
        write_rows(T{}, out, row, 1, p.sizes.D, head_of<T>(p.out, block.b, block.n, block.queries[i]), p.out.stride_l,
                   [&](int64_t) { return float(1 / sum); });
    }
}

template <class T>
void forward_block(ForwardParams const& p, Block const& block, float* memory) {
    int64_t const D = p.sizes.D;
    Room whole(memory);
    ForwardRoom<T> const room(whole, D, block.count, block.keys_at_once);
    attend(tokens_at<T>(p.q, block, block.queries, block.count, D),
           tokens_at<T>(p.k, block, block.keys, block.num_keys, D),
           tokens_at<T>(p.v, block, block.keys, block.num_keys, D), block.keys_at_once, p.scale, room);
    scatter<T>(p, block, room.out, room.columns, __builtin_fabsf(p.scale), room.running);
}

template <class T>
constexpr CpuKernels kBlockKernels = {&forward_tiles<T>, &forward_room<T>, &forward_block<T>};

inline CpuKernels const& block_kernels_of(DType dtype) {
    switch (dtype) {
        case DType::bf16: return kBlockKernels<BFloat16>;
        case DType::f16: return kBlockKernels<Float16>;
        default: return kBlockKernels<Float32>;
    }
}

}  // namespace hunyuan_fast::sliding_tile_attention::HUNYUAN_FAST_ISA
