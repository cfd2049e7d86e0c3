#define HUNYUAN_FAST_ISA avx512
#include "group_norm_silu/cpu_kernels.h"

namespace hunyuan_fast::group_norm_silu {

CpuKernels const& avx512_kernels(DType dtype, bool silu) { return avx512::kernels_of(dtype, silu); }

}  // namespace hunyuan_fast::group_norm_silu
