#include "gelu_tanh/cpu.h"

#include <algorithm>
#include <cstring>

#include "common/cpu_isa.h"
#include "common/parallel.h"

namespace hunyuan_fast::gelu_tanh {
namespace {

// Some 5 microseconds of work: long against taking the next piece, short against waiting for the last. Of
// large tensors as much as 2 MB, so that two threads seldom wait for the same fresh page.
constexpr int64_t kSmallestPiece = 16 * 1024;
constexpr int64_t kLargestPiece = 512 * 1024;

int64_t elements_per_piece(int64_t count, int num_threads) {
    int64_t const few = count / (8 * std::max(num_threads, 1)) / kSmallestPiece * kSmallestPiece;
    return std::min(std::max(few, kSmallestPiece), kLargestPiece);  // whole lines of the cache
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

void copy_row(CopyParams const& p, int64_t row) {
    auto const at = [&](Rows const& rows) {
        return static_cast<char*>(rows.data) + offset_of(p.grid, rows, row) * p.element_size;
    };
    std::memcpy(at(p.to), at(p.from), size_t(p.grid.width * p.element_size));
}

}  // namespace

void forward_cpu(DType dtype, ForwardParams const& params, int num_threads) {
    auto const forward = kernels(dtype).forward;
    int64_t const count = params.grid.rows * params.grid.width;
    parallel_for(count, elements_per_piece(count, num_threads), num_threads,
                 [&](int64_t first, int64_t last) { forward(params, first, last); });
}

void concat_cpu(DType dtype, CopyParams const& left, ForwardParams const& params, int num_threads) {
    auto const forward = kernels(dtype).forward;
    int64_t const width = params.grid.width;
    int64_t const whole = left.grid.width + width;
    int64_t const grain = elements_per_piece(params.grid.rows * whole, num_threads) / whole;
    parallel_for(params.grid.rows, std::max<int64_t>(1, grain), num_threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            copy_row(left, row);
            forward(params, row * width, (row + 1) * width);
        }
    });
}

void backward_cpu(DType dtype, BackwardParams const& params, int num_threads) {
    auto const backward = kernels(dtype).backward;
    int64_t const count = params.grid.rows * params.grid.width;
    parallel_for(count, elements_per_piece(count, num_threads), num_threads,
                 [&](int64_t first, int64_t last) { backward(params, first, last); });
}

}  // namespace hunyuan_fast::gelu_tanh
