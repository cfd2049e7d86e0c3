// The CPU kernels of the instruction sets this build has, and who runs them.
#pragma once

#include "common/tensor_view.h"
#include "qk_norm_rope/params.h"

namespace hunyuan_fast::qk_norm_rope {

// Each works on the half-open range [begin, end) of its kind; ranges may run at the same time.
struct CpuKernels {
    void (*forward_rows)(ForwardParams const&, int64_t begin, int64_t end);
    void (*backward_chunks)(BackwardParams const&, int64_t begin, int64_t end);
};

// One table per instruction set; the first two exist where HUNYUAN_FAST_X86 is defined.
CpuKernels const& avx512_kernels(DType dtype);
CpuKernels const& avx2_kernels(DType dtype);
CpuKernels const& plain_kernels(DType dtype);

void forward_cpu(DType dtype, ForwardParams const& params, int num_threads);
void backward_cpu(DType dtype, BackwardParams const& params, int num_threads);

}  // namespace hunyuan_fast::qk_norm_rope
