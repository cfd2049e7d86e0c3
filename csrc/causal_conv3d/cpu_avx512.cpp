#define HUNYUAN_FAST_ISA avx512
#include "causal_conv3d/cpu_kernels.h"

namespace hunyuan_fast::causal_conv3d {

CpuKernels const& avx512_kernels() { return avx512::kKernels; }

}  // namespace hunyuan_fast::causal_conv3d
