#include "ring_attention/cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/cpu_isa.h"
#include "common/parallel.h"

namespace hunyuan_fast::ring_attention {
namespace {

// Some 5 microseconds of work: long against taking the next piece.
constexpr int64_t kElementsPerPiece = 16 * 1024;

int64_t rows_per_piece(Sizes const& size) {
    return std::max<int64_t>(1, kElementsPerPiece / std::max<int64_t>(1, size.D));
}

CpuKernels const& kernels(DType dtype) {
    switch (cpu_isa()) {
#ifdef HUNYUAN_FAST_X86
        case CpuIsa::avx512: return avx512_kernels(dtype);
        case CpuIsa::avx2: return avx2_kernels(dtype);
#endif
        default: return plain_kernels(dtype);
    }
}

}  // namespace

Shares shares_of(float lse, float part_lse) {
    constexpr float kNothing = -std::numeric_limits<float>::infinity();
    if (std::isnan(lse) || std::isnan(part_lse)) return {lse + part_lse, lse + part_lse, lse + part_lse};
    if (part_lse == kNothing) return {lse == kNothing ? 0.0f : 1.0f, 0.0f, lse};
    if (lse == kNothing) return {0.0f, 1.0f, part_lse};
    // of the larger one the weight is 1, of the other one e
    float const e = std::exp(-std::fabs(lse - part_lse));
    float const large = 1.0f / (1.0f + e);
    float const small = e * large;
    bool const first_is_larger = lse > part_lse;
    float const most = first_is_larger ? lse : part_lse;
    float const both = most + std::log1p(e);
    return first_is_larger ? Shares{large, small, both} : Shares{small, large, both};
}

void forward_cpu(DType dtype, ForwardParams const& params, int num_threads) {
    auto const forward = kernels(dtype).forward;
    parallel_for(params.size.rows(), rows_per_piece(params.size), num_threads,
                 [&](int64_t first, int64_t last) { forward(params, first, last); });
}

void backward_cpu(DType dtype, BackwardParams const& params, int num_threads) {
    auto const backward = kernels(dtype).backward;
    parallel_for(params.size.rows(), rows_per_piece(params.size), num_threads,
                 [&](int64_t first, int64_t last) { backward(params, first, last); });
}

}  // namespace hunyuan_fast::ring_attention
