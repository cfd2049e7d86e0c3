#define HUNYUAN_FAST_ISA avx2
#include "qk_norm_rope/cpu_kernels.h"

namespace hunyuan_fast::qk_norm_rope {

CpuKernels const& avx2_kernels(DType dtype) { return avx2::kernels_of(dtype); }

}  // namespace hunyuan_fast::qk_norm_rope
