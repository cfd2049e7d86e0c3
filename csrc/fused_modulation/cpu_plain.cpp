#define HUNYUAN_FAST_ISA plain
#include "fused_modulation/cpu_kernels.h"

namespace hunyuan_fast::fused_modulation {

CpuKernels plain_kernels(Kind const& kind) { return plain::kernels_of(kind); }

}  // namespace hunyuan_fast::fused_modulation
