#define HUNYUAN_FAST_ISA avx2
#include "ring_attention/cpu_kernels.h"

namespace hunyuan_fast::ring_attention {

CpuKernels const& avx2_kernels(DType dtype) { return avx2::kernels_of(dtype); }

}  // namespace hunyuan_fast::ring_attention
