// The CPU kernels of the instruction sets this build has, and who runs them.
#pragma once

#include "common/tensor_view.h"
#include "ring_attention/params.h"

namespace hunyuan_fast::ring_attention {

// Each works on the rows [begin, end), counted by sample, token, head; ranges may run at the same time.
struct CpuKernels {
    void (*forward)(ForwardParams const&, int64_t begin, int64_t end);
    void (*backward)(BackwardParams const&, int64_t begin, int64_t end);
};

// One table per instruction set, by the dtype of the part; the first two exist where HUNYUAN_FAST_X86 is
// defined.
CpuKernels const& avx512_kernels(DType dtype);
CpuKernels const& avx2_kernels(DType dtype);
CpuKernels const& plain_kernels(DType dtype);

void forward_cpu(DType dtype, ForwardParams const& params, int num_threads);
void backward_cpu(DType dtype, BackwardParams const& params, int num_threads);

// How much of a row is of the accumulator and of the part, and the log-sum-exp of both. What has seen no key,
// or hardly any beside the other, has a share of 0 and is not read.
struct Shares {
    float first;
    float second;
    float lse;
};

// In a file of its own, compiled once: the mathematics of the standard library is no template, but inline
// where the compiler likes.
Shares shares_of(float lse, float part_lse);

}  // namespace hunyuan_fast::ring_attention
