#define HUNYUAN_FAST_ISA avx512_bf16
#include "rope3d_attention/cpu_kernels.h"

namespace hunyuan_fast::rope3d_attention {

CpuKernels const& avx512_bf16_kernels() { return avx512_bf16::kernels_of(DType::bf16); }

}  // namespace hunyuan_fast::rope3d_attention
