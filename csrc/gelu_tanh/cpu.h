// The CPU kernels of the instruction sets this build has, and who runs them.
#pragma once

#include "common/tensor_view.h"
#include "gelu_tanh/params.h"

namespace hunyuan_fast::gelu_tanh {

// Each works on the elements [begin, end), counted through all rows; ranges may run at the same time.
struct CpuKernels {
    void (*forward)(ForwardParams const&, int64_t begin, int64_t end);
    void (*backward)(BackwardParams const&, int64_t begin, int64_t end);
};

// One table per instruction set; the first two exist where HUNYUAN_FAST_X86 is defined.
CpuKernels const& avx512_kernels(DType dtype);
CpuKernels const& avx2_kernels(DType dtype);
CpuKernels const& plain_kernels(DType dtype);

void forward_cpu(DType dtype, ForwardParams const& params, int num_threads);
// Row by row, what is copied and then what is computed: one walk over the memory of y.
void concat_cpu(DType dtype, CopyParams const& left, ForwardParams const& params, int num_threads);
void backward_cpu(DType dtype, BackwardParams const& params, int num_threads);

// The offset of a row in elements.
inline int64_t offset_of(Grid const& grid, Rows const& rows, int64_t row) {
    int64_t offset = 0;
    for (int d = grid.outer - 1; d > 0; --d) {
        offset += row % grid.size[d] * rows.stride[d];
        row /= grid.size[d];
    }
    return grid.outer == 0 ? 0 : offset + row * rows.stride[0];
}

}  // namespace hunyuan_fast::gelu_tanh
