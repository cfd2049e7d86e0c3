// Gradients of sliding-tile attention for tests/ops/test_sliding_tile_attention_cpu_faults.py, without Python and with
// memory that is NaN until it is written.
#include <cstdlib>
#include <cstring>
#include <new>

#include "sliding_tile_attention/cpu.h"

// The kernels take all their memory so.
void* operator new[](std::size_t bytes) {
    void* const memory = std::malloc(bytes);
    if (!memory) throw std::bad_alloc();
    return std::memset(memory, 0xff, bytes);
}
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }

using hunyuan_fast::DType;
using hunyuan_fast::rope3d_attention::Heads;
using namespace hunyuan_fast::sliding_tile_attention;

namespace {

Sizes3 sizes_at(int64_t const* three) { return {three[0], three[1], three[2]}; }

}  // namespace

// tensors: dout, out, q, k, v, dq, dk, dv, each (B, L, N, D) and contiguous; windows (N, 3).
extern "C" void gradients(int64_t const* sizes, int64_t bf16, void* const* tensors, float const* lse,
                          int64_t const* windows, int64_t const* grid, int64_t const* tile, int64_t const* lengths,
                          double scale, int64_t threads) {
    BackwardParams p;
    p.sizes = {sizes[0], sizes[1], sizes[2], sizes[3]};
    p.keys = p.sizes.L;
    p.scale = float(scale);
    p.lengths = p.queries = lengths;
    p.lse = lse;
    for (Heads* x : {&p.dout, &p.out, &p.q, &p.k, &p.v, &p.dq, &p.dk, &p.dv}) {
        *x = {*tensors++, p.sizes.L * p.sizes.N * p.sizes.D, p.sizes.N * p.sizes.D, p.sizes.D};
    }
    std::vector<Sizes3> of_heads;
    for (int64_t n = 0; n < p.sizes.N; ++n) of_heads.push_back(sizes_at(windows + 3 * n));
    backward_cpu(bf16 ? DType::bf16 : DType::f32, p, sizes_at(grid), sizes_at(tile), of_heads, int(threads));
}
