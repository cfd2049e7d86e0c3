#include "causal_conv3d/cpu.h"

#include <algorithm>

#include "common/cpu_isa.h"
#include "common/parallel.h"

namespace hunyuan_fast::causal_conv3d {
namespace {

CpuKernels const& kernels() {
    switch (cpu_isa()) {
#ifdef HUNYUAN_FAST_X86
        case CpuIsa::avx512: return avx512_kernels();
        case CpuIsa::avx2: return avx2_kernels();
#endif
        default: return plain_kernels();
    }
}

}  // namespace

Boxes boxes_of(Size const& out) {
    auto const parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
    Size box;
    box.w = std::min<int64_t>(out.w, 16);
    box.h = std::min<int64_t>(out.h, kTile / box.w);
    box.t = std::min<int64_t>(out.t, kTile / (box.w * box.h));
    return {box, {parts(out.t, box.t), parts(out.h, box.h), parts(out.w, box.w)}};
}

Packing packing_cpu(int64_t O) { return kernels().packing(O); }

void pack_cpu(Params const& params, Weights const& weights, float* packed, int num_threads) {
    parallel_for(packing_cpu(params.O).blocks, 1, num_threads, [&](int64_t first, int64_t last) {
        kernels().pack(params, weights, packed, first, last);
    });
}

void run_cpu(Params const& params, int num_threads) {
    if (params.B * params.out.count() == 0) return;
    parallel_for(params.B * boxes_of(params.out).number.count(), 1, num_threads,
                 [&](int64_t first, int64_t last) { kernels().run_boxes(params, first, last); });
}

}  // namespace hunyuan_fast::causal_conv3d
