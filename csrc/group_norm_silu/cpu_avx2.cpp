#define HUNYUAN_FAST_ISA avx2
#include "group_norm_silu/cpu_kernels.h"

namespace hunyuan_fast::group_norm_silu {

CpuKernels const& avx2_kernels(DType dtype, bool silu) { return avx2::kernels_of(dtype, silu); }

}  // namespace hunyuan_fast::group_norm_silu
