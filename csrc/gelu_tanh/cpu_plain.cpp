#define HUNYUAN_FAST_ISA plain
#include "gelu_tanh/cpu_kernels.h"

namespace hunyuan_fast::gelu_tanh {

CpuKernels const& plain_kernels(DType dtype) { return plain::kernels_of(dtype); }

}  // namespace hunyuan_fast::gelu_tanh
