// The CPU kernels of the instruction sets this build has, and who runs them.
#pragma once

#include "common/tensor_view.h"
#include "group_norm_silu/params.h"

namespace hunyuan_fast::group_norm_silu {

// Sums over the values of a chunk, one number for each lane of a period, in consecutive order.
struct Sums {
    float* centre;  // about which values were added up; not for gradients
    float* first;   // of x - centre, or of dz
    float* second;  // of its square, or of dz (x - centre)
};
inline constexpr int kRooms = 6;  // periods of scratch memory that make the sums of a chunk

// Chunks are numbered over all samples; different ones may be worked on at the same time.
struct CpuKernels {
    Sums (*statistics)(StatisticsParams const&, int64_t chunk, float* room);
    void (*forward)(ForwardParams const&, int64_t begin, int64_t end);
    Sums (*gradient_sums)(BackwardParams const&, int64_t chunk, float* room);
    void (*backward)(BackwardParams const&, int64_t begin, int64_t end);
    void (*order)(float* line, int64_t count);  // from consecutive order to that of the pairs
};

// One table per instruction set; the first two exist where HUNYUAN_FAST_X86 is defined.
CpuKernels const& avx512_kernels(DType dtype, bool silu);
CpuKernels const& avx2_kernels(DType dtype, bool silu);
CpuKernels const& plain_kernels(DType dtype, bool silu);

// Fills in the period and the chunks, which depend on the size of a sample alone.
void divide(Sizes& sizes);

// Of every sample and group, (3, B, G): the number of values, their mean, the sum of squares about it.
void statistics_cpu(DType dtype, StatisticsParams const& params, double* stats, int num_threads);

struct Norm {
    float const* weight = nullptr;  // (C,)
    float const* bias = nullptr;    // (C,)
    double const* stats = nullptr;  // (3, B, G)
    double eps = 0;
    bool silu = false;
};

void forward_cpu(DType dtype, Norm const& norm, ForwardParams params, int num_threads);
// dweight and dbias (C,) as sums over all samples.
void backward_cpu(DType dtype, Norm const& norm, BackwardParams params, float* dweight, float* dbias,
                  int num_threads);

}  // namespace hunyuan_fast::group_norm_silu
