#define HUNYUAN_FAST_ISA plain
#include "sliding_tile_attention/cpu_kernels.h"

namespace hunyuan_fast::sliding_tile_attention {

CpuKernels const& plain_kernels(DType dtype) { return plain::block_kernels_of(dtype); }

}  // namespace hunyuan_fast::sliding_tile_attention
