#define HUNYUAN_FAST_ISA avx2
#include "fused_modulation/cpu_kernels.h"

namespace hunyuan_fast::fused_modulation {

CpuKernels avx2_kernels(Kind const& kind) { return avx2::kernels_of(kind); }

}  // namespace hunyuan_fast::fused_modulation
