#include "causal_conv3d/cpu.h"

#include <algorithm>
#include <memory>

#include "common/cpu_isa.h"
#include "common/parallel.h"

namespace hunyuan_fast::causal_conv3d {
namespace {

// Enough to occupy a machine evenly.
constexpr int64_t kFewPieces = 64;

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

Packing packing_cpu(int64_t O, int64_t C) { return kernels().packing(O, C); }

void pack_cpu(Params const& params, Weights const& weights, float* packed, int num_threads) {
    parallel_for(packing_cpu(params.O, params.C).blocks, 1, num_threads, [&](int64_t first, int64_t last) {
        kernels().pack(params, weights, packed, first, last);
    });
}

Size window_of(Params const& p) {
    Size const box = boxes_of(p.out).box;
    auto const reach = [](int64_t size, int64_t stride, int64_t taps) { return (size - 1) * stride + taps; };
    return {std::min(reach(box.t, p.stride.t, p.kernel.t), p.past_frames + p.in.t),
            std::min(reach(box.h, p.stride.h, p.kernel.h), p.in.h),
            std::min(reach(box.w, p.stride.w, p.kernel.w), p.in.w)};
}

void run_cpu(Params const& params, int num_threads) {
    int64_t const boxes = params.B * boxes_of(params.out).number.count();
    if (boxes == 0) return;
    // one thread takes boxes that share activated frames, where there are enough for all threads
    int64_t const grain = params.scale ? std::clamp<int64_t>(boxes / kFewPieces, 1, boxes_of(params.out).number.t) : 1;
    int64_t const values = params.scale ? window_of(params).count() * params.C : 0;
    parallel_for(boxes, grain, num_threads, [&](int64_t first, int64_t last) {
        std::unique_ptr<float[]> const room(values ? new float[size_t(values)] : nullptr);
        kernels().run_boxes(params, first, last, room.get());
    });
}

}  // namespace hunyuan_fast::causal_conv3d
