#define HUNYUAN_FAST_ISA avx2
#include "gelu_tanh/cpu_kernels.h"

namespace hunyuan_fast::gelu_tanh {

CpuKernels const& avx2_kernels(DType dtype) { return avx2::kernels_of(dtype); }

}  // namespace hunyuan_fast::gelu_tanh
