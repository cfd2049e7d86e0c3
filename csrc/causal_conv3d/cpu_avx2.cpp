#define HUNYUAN_FAST_ISA avx2
#include "causal_conv3d/cpu_kernels.h"

namespace hunyuan_fast::causal_conv3d {

CpuKernels const& avx2_kernels() { return avx2::kKernels; }

}  // namespace hunyuan_fast::causal_conv3d
