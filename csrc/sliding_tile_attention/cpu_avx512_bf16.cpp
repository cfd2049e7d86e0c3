#define HUNYUAN_FAST_ISA avx512_bf16
#include "sliding_tile_attention/cpu_kernels.h"

namespace hunyuan_fast::sliding_tile_attention {

CpuKernels const& avx512_bf16_kernels() { return avx512_bf16::block_kernels_of(DType::bf16); }

}  // namespace hunyuan_fast::sliding_tile_attention
