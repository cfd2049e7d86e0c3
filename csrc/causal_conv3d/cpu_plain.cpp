#define HUNYUAN_FAST_ISA plain
#include "causal_conv3d/cpu_kernels.h"

namespace hunyuan_fast::causal_conv3d {

CpuKernels const& plain_kernels() { return plain::kKernels; }

}  // namespace hunyuan_fast::causal_conv3d
