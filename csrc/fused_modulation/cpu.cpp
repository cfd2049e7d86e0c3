#include "fused_modulation/cpu.h"

#include <algorithm>

#include "common/cpu_isa.h"
#include "common/parallel.h"

namespace hunyuan_fast::fused_modulation {
namespace {

// A piece of work should outlast the waking of a thread, some 10 microseconds, many times over.
constexpr int64_t kElementsPerPiece = 64 * 1024;
// Whole cache lines of the sums, so that no two threads write to one.
constexpr int64_t kColumnsPerPiece = 512;

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

void forward_cpu(DType dtype, ForwardParams const& params, int num_threads) {
    auto const forward_rows = kernels(dtype).forward_rows;
    int64_t const rows = params.sizes.B * params.sizes.L;
    int64_t const grain = std::max<int64_t>(1, kElementsPerPiece / params.sizes.E);
    parallel_for(rows, grain, num_threads,
                 [&](int64_t first, int64_t last) { forward_rows(params, first, last); });
}

void backward_cpu(DType dtype, BackwardParams const& params, int num_threads) {
    CpuKernels const& run = kernels(dtype);
    int64_t const chunks = params.sizes.B * params.chunks;
    int64_t const grain = std::max<int64_t>(1, kElementsPerPiece / (params.chunk_rows * params.sizes.E));
    parallel_for(chunks, grain, num_threads,
                 [&](int64_t first, int64_t last) { run.backward_chunks(params, first, last); });
    parallel_for(params.sizes.E, kColumnsPerPiece, num_threads,
                 [&](int64_t first, int64_t last) { run.reduce_columns(params, first, last); });
}

}  // namespace hunyuan_fast::fused_modulation
