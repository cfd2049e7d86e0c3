#define HUNYUAN_FAST_ISA plain
#include "group_norm_silu/cpu_kernels.h"

namespace hunyuan_fast::group_norm_silu {

CpuKernels const& plain_kernels(DType dtype, bool silu) { return plain::kernels_of(dtype, silu); }

}  // namespace hunyuan_fast::group_norm_silu
