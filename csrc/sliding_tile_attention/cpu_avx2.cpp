#define HUNYUAN_FAST_ISA avx2
#include "sliding_tile_attention/cpu_kernels.h"

namespace hunyuan_fast::sliding_tile_attention {

CpuKernels const& avx2_kernels(DType dtype) { return avx2::block_kernels_of(dtype); }

}  // namespace hunyuan_fast::sliding_tile_attention
