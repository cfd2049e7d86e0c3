// Who runs the CPU kernels of attention over boxes of a grid.
#pragma once

#include <vector>

#include "common/tensor_view.h"
#include "rope3d_attention/cpu.h"
#include "sliding_tile_attention/pattern.h"

namespace hunyuan_fast::sliding_tile_attention {

using rope3d_attention::BackwardParams;
using rope3d_attention::ForwardParams;
using rope3d_attention::Inputs;

// windows: of each head.
void forward_cpu(DType dtype, ForwardParams const& params, Sizes3 const& grid, Sizes3 const& tile,
                 std::vector<Sizes3> const& windows, int num_threads);
void backward_cpu(DType dtype, BackwardParams const& params, Sizes3 const& grid, Sizes3 const& tile,
                  std::vector<Sizes3> const& windows, int num_threads);

// Bytes that backward has while it runs, beside tensors and the numbers of the tokens.
int64_t backward_bytes(DType dtype, Inputs const& params, Sizes3 const& grid, Sizes3 const& tile,
                       std::vector<Sizes3> const& windows, int num_threads);

}  // namespace hunyuan_fast::sliding_tile_attention
