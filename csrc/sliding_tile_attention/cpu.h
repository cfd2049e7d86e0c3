// The CPU kernels of the instruction sets this build has, and who runs them.
#pragma once

#include "common/tensor_view.h"
#include "rope3d_attention/cpu.h"
#include "sliding_tile_attention/pattern.h"

namespace hunyuan_fast::sliding_tile_attention {

using rope3d_attention::ForwardParams;
using rope3d_attention::Tiles;

// Some queries of a group in one head, and its keys, `keys_at_once` of them.
struct Block {
    int64_t b = 0;
    int64_t n = 0;
    int64_t const* queries = nullptr;
    int64_t count = 0;
    int64_t const* keys = nullptr;
    int64_t num_keys = 0;
    int64_t keys_at_once = 0;
};

// As of attention: most tokens at once, floats of memory for a block, and the block itself.
struct CpuKernels {
    Tiles (*tiles)(int64_t D);
    int64_t (*room)(int64_t D, int64_t queries, int64_t keys);
    void (*forward)(ForwardParams const&, Block const&, float* room);
};

CpuKernels const& avx512_bf16_kernels();
CpuKernels const& avx512_kernels(DType dtype);
CpuKernels const& avx2_kernels(DType dtype);
CpuKernels const& plain_kernels(DType dtype);

// windows: of each head.
void forward_cpu(DType dtype, ForwardParams const& params, Sizes3 const& grid, Sizes3 const& tile,
                 std::vector<Sizes3> const& windows, int num_threads);

}  // namespace hunyuan_fast::sliding_tile_attention
