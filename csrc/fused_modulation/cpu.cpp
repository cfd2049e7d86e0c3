#include "fused_modulation/cpu.h"

#include <algorithm>
#include <memory>

#include "common/cpu_isa.h"
#include "common/parallel.h"

namespace hunyuan_fast::fused_modulation {
namespace {

// A piece of work should outlast the waking of a thread, some 10 microseconds, many times over.
constexpr int64_t kElementsPerPiece = 64 * 1024;

CpuKernels kernels(Kind const& kind) {
    switch (cpu_isa()) {
#ifdef HUNYUAN_FAST_X86
        case CpuIsa::avx512: return avx512_kernels(kind);
        case CpuIsa::avx2: return avx2_kernels(kind);
#endif
        default: return plain_kernels(kind);
    }
}

// Vectors of 16 bits are few beside the rows that meet them: they become floats once, ahead of all rows.
class Floats {
public:
    Floats(Kind const& kind, CpuKernels const& run, Sizes const& sizes) : kind_(kind), run_(run), sizes_(sizes) {}

    void widen(Vectors& vectors) {
        if (vectors.data == nullptr || kind_.vector == DType::f32) return;
        int64_t const per_sample = sizes_.M * sizes_.E;
        auto& room = rooms_[used_++];
        room.reset(new float[size_t(sizes_.B * per_sample)]);
        for (int64_t b = 0; b < sizes_.B; ++b) {
            for (int64_t m = 0; m < sizes_.M; ++m) {
                auto const* from = static_cast<uint16_t const*>(vectors.data);
                run_.widen(from + b * vectors.stride_b + m * vectors.stride_m,
                           room.get() + b * per_sample + m * sizes_.E, sizes_.E);
            }
        }
        vectors = {room.get(), per_sample, sizes_.E};
    }

private:
    Kind const& kind_;
    CpuKernels const& run_;
    Sizes const& sizes_;
    std::unique_ptr<float[]> rooms_[3];
    int used_ = 0;
};

}  // namespace

void forward_cpu(Kind const& kind, ForwardParams params, int num_threads) {
    CpuKernels const run = kernels(kind);
    Floats floats(kind, run, params.sizes);
    for (Vectors* each : {&params.gate, &params.shift, &params.scale}) floats.widen(*each);
    int64_t const rows = params.sizes.B * params.sizes.L;
    int64_t const grain = std::max<int64_t>(1, kElementsPerPiece / params.sizes.E);
    parallel_for(rows, grain, num_threads,
                 [&](int64_t first, int64_t last) { run.forward_rows(params, first, last); });
}

void backward_cpu(Kind const& kind, BackwardParams params, int num_threads) {
    CpuKernels const run = kernels(kind);
    Floats floats(kind, run, params.sizes);
    for (Vectors* each : {&params.gate, &params.scale}) floats.widen(*each);
    int64_t const chunks = params.sizes.B * params.chunks;
    int64_t const grain = std::max<int64_t>(1, kElementsPerPiece / (params.chunk_rows * params.sizes.E));
    parallel_for(chunks, grain, num_threads,
                 [&](int64_t first, int64_t last) { run.backward_chunks(params, first, last); });
    parallel_for(params.sizes.M * params.sizes.E, kColumnsPerPiece, num_threads,
                 [&](int64_t first, int64_t last) { run.reduce_columns(params, first, last); });
}

}  // namespace hunyuan_fast::fused_modulation
