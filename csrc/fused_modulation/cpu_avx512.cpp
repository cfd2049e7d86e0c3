#define HUNYUAN_FAST_ISA avx512
#include "fused_modulation/cpu_kernels.h"

namespace hunyuan_fast::fused_modulation {

CpuKernels const& avx512_kernels(DType dtype) { return avx512::kernels_of(dtype); }

}  // namespace hunyuan_fast::fused_modulation
