#define HUNYUAN_FAST_ISA avx512
#include "gelu_tanh/cpu_kernels.h"

namespace hunyuan_fast::gelu_tanh {

CpuKernels const& avx512_kernels(DType dtype) { return avx512::kernels_of(dtype); }

}  // namespace hunyuan_fast::gelu_tanh
