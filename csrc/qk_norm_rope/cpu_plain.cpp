#define HUNYUAN_FAST_ISA plain
#include "qk_norm_rope/cpu_kernels.h"

namespace hunyuan_fast::qk_norm_rope {

CpuKernels const& plain_kernels(DType dtype) { return plain::kernels_of(dtype); }

}  // namespace hunyuan_fast::qk_norm_rope
