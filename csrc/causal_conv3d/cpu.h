// The CPU kernels of the instruction sets this build has, and who runs them.
#pragma once

#include "causal_conv3d/params.h"

namespace hunyuan_fast::causal_conv3d {

// Output positions of a box at most: their sums wait in the second-level cache while weights pass.
constexpr int64_t kTile = 192;

Boxes boxes_of(Size const& out);
// Frames, rows and columns that a box reads at most.
Size window_of(Params const& params);

struct CpuKernels {
    Packing (*packing)(int64_t O, int64_t C);
    // Packs blocks [begin, end).
    void (*pack)(Params const&, Weights const&, float* packed, int64_t begin, int64_t end);
    // Computes boxes [begin, end) of all samples; room: for a window's values where x is activated, else null.
    void (*run_boxes)(Params const&, int64_t begin, int64_t end, float* room);
};

// One table per instruction set; the first two exist where HUNYUAN_FAST_X86 is defined.
CpuKernels const& avx512_kernels();
CpuKernels const& avx2_kernels();
CpuKernels const& plain_kernels();

Packing packing_cpu(int64_t O, int64_t C);
void pack_cpu(Params const& params, Weights const& weights, float* packed, int num_threads);
void run_cpu(Params const& params, int num_threads);

}  // namespace hunyuan_fast::causal_conv3d
