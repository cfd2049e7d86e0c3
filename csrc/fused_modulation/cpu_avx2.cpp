#define HUNYUAN_FAST_ISA avx2
#include "fused_modulation/cpu_kernels.h"

namespace hunyuan_fast::fused_modulation {

CpuKernels const& avx2_kernels(DType dtype) { return avx2::kernels_of(dtype); }

}  // namespace hunyuan_fast::fused_modulation
