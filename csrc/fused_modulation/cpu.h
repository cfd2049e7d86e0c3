// The CPU kernels of the instruction sets this build has, and who runs them.
#pragma once

#include "common/tensor_view.h"
#include "fused_modulation/params.h"

namespace hunyuan_fast::fused_modulation {

// Columns of the vectors' gradients that are added up at a time.
constexpr int64_t kColumnsPerPiece = 512;

// Rows up to this width can wait in the first-level cache until they are streamed.
constexpr int64_t kMaxStreamed = 8192;

inline int64_t blocks_of(int64_t E) { return (E + kColumnsPerPiece - 1) / kColumnsPerPiece; }

// What a call is made of. y without a gate half, and vector without any, may be anything.
struct Kind {
    DType x = DType::f32;
    DType y = DType::f32;
    DType vector = DType::f32;
    bool gate = false;
    bool norm = false;
};

// The kernels of a kind. Each works on the half-open range [begin, end) of its items; ranges may run at
// the same time. Forward and backward read vectors as `prepare` makes them; fp32 beside rows that are not bf16 needs none.
struct CpuKernels {
    void (*forward_rows)(ForwardParams const&, int64_t begin, int64_t end);
    void (*backward_chunks)(BackwardParams const&, int64_t begin, int64_t end);
    void (*reduce_blocks)(BackwardParams const&, int64_t begin, int64_t end);
    void (*prepare)(void const* vector, float* out, int64_t E);
};

// One per instruction set; the first two exist where HUNYUAN_FAST_X86 is defined.
CpuKernels avx512_kernels(Kind const& kind);
CpuKernels avx2_kernels(Kind const& kind);
CpuKernels plain_kernels(Kind const& kind);

void forward_cpu(Kind const& kind, ForwardParams params, int num_threads);
void backward_cpu(Kind const& kind, BackwardParams params, int num_threads);

}  // namespace hunyuan_fast::fused_modulation
