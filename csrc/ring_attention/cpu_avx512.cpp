#define HUNYUAN_FAST_ISA avx512
#include "ring_attention/cpu_kernels.h"

namespace hunyuan_fast::ring_attention {

CpuKernels const& avx512_kernels(DType dtype) { return avx512::kernels_of(dtype); }

}  // namespace hunyuan_fast::ring_attention
