#define HUNYUAN_FAST_ISA avx512
#include "fused_modulation/cpu_kernels.h"

namespace hunyuan_fast::fused_modulation {

CpuKernels avx512_kernels(Kind const& kind) { return avx512::kernels_of(kind); }

}  // namespace hunyuan_fast::fused_modulation
