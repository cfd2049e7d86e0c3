#define HUNYUAN_FAST_ISA plain
#include "fused_modulation/cpu_kernels.h"

namespace hunyuan_fast::fused_modulation {

CpuKernels const& plain_kernels(DType dtype) { return plain::kernels_of(dtype); }

}  // namespace hunyuan_fast::fused_modulation
