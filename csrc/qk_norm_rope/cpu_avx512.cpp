#define HUNYUAN_FAST_ISA avx512
#include "qk_norm_rope/cpu_kernels.h"

namespace hunyuan_fast::qk_norm_rope {

CpuKernels const& avx512_kernels(DType dtype) { return avx512::kernels_of(dtype); }

}  // namespace hunyuan_fast::qk_norm_rope
