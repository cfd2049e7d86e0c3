#define HUNYUAN_FAST_ISA plain
#include "ring_attention/cpu_kernels.h"

namespace hunyuan_fast::ring_attention {

CpuKernels const& plain_kernels(DType dtype) { return plain::kernels_of(dtype); }

}  // namespace hunyuan_fast::ring_attention
