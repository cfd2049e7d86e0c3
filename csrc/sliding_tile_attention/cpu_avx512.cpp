#define HUNYUAN_FAST_ISA avx512
#include "sliding_tile_attention/cpu_kernels.h"

namespace hunyuan_fast::sliding_tile_attention {

CpuKernels const& avx512_kernels(DType dtype) { return avx512::block_kernels_of(dtype); }

}  // namespace hunyuan_fast::sliding_tile_attention
