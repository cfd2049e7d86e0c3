#include "qk_norm_rope/cpu.h"

#include <algorithm>
#include <vector>

#include "common/cpu_isa.h"
#include "common/parallel.h"

namespace hunyuan_fast::qk_norm_rope {
namespace {

// A piece of work should outlast the waking of a thread, some 10 microseconds, many times over.
constexpr int64_t kElementsPerPiece = 64 * 1024;

CpuKernels const& kernels(DType dtype) {
    switch (cpu_isa()) {
#ifdef HUNYUAN_FAST_X86
        case CpuIsa::avx512: return avx512_kernels(dtype);
        case CpuIsa::avx2: return avx2_kernels(dtype);
#endif
        default: return plain_kernels(dtype);
    }
}

int64_t pieces(int64_t elements) { return std::max<int64_t>(1, kElementsPerPiece / elements); }

// In order, and in double precision: there may be tens of thousands of rows in the sums.
void add_chunks(BackwardParams const& p) {
    int64_t const columns = p.streams * 2 * p.sizes.D;
    std::vector<double> sums(size_t(columns), 0.0);
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
        float const* part = p.partials + chunk * columns;
        for (int64_t i = 0; i < columns; ++i) sums[size_t(i)] += double(part[i]);
    }
    for (int64_t i = 0; i < columns; ++i) p.dweights[i] = float(sums[size_t(i)]);
}

}  // namespace

void forward_cpu(DType dtype, ForwardParams const& params, int num_threads) {
    auto const forward_rows = kernels(dtype).forward_rows;
    Sizes const& sizes = params.sizes;
    parallel_for(sizes.B * sizes.L, pieces(3 * sizes.N * sizes.D), num_threads,
                 [&](int64_t first, int64_t last) { forward_rows(params, first, last); });
}

void backward_cpu(DType dtype, BackwardParams const& params, int num_threads) {
    auto const backward_chunks = kernels(dtype).backward_chunks;
    int64_t const chunk_elements = params.chunk_rows * 3 * params.sizes.N * params.sizes.D;
    parallel_for(params.chunks, pieces(chunk_elements), num_threads,
                 [&](int64_t first, int64_t last) { backward_chunks(params, first, last); });
    add_chunks(params);
}

}  // namespace hunyuan_fast::qk_norm_rope
