#define HUNYUAN_FAST_ISA plain
#include "rope3d_attention/cpu_kernels.h"

namespace hunyuan_fast::rope3d_attention {

CpuKernels const& plain_kernels(DType dtype) { return plain::kernels_of(dtype); }

}  // namespace hunyuan_fast::rope3d_attention
