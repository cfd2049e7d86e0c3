#include "fused_modulation/cpu.h"

#include <algorithm>
#include <memory>

#include "common/cpu_isa.h"
#include "common/parallel.h"

namespace hunyuan_fast::fused_modulation {
namespace {

// How many items of so many elements a thread takes at a time. Threads of torch that still spin after its
// last op take work up within a microsecond, so even a short call is worth sharing; a long one is better
// cut into pieces that amount to more than their handing over.
int64_t items_per_piece(int64_t items, int64_t elements) {
    int64_t const wanted = std::min<int64_t>(std::max<int64_t>(items * elements / 64, 16 * 1024), 64 * 1024);
    return std::max<int64_t>(1, wanted / elements);
}

CpuKernels kernels(Kind const& kind) {
    switch (cpu_isa()) {
#ifdef HUNYUAN_FAST_X86
        case CpuIsa::avx512: return avx512_kernels(kind);
        case CpuIsa::avx2: return avx2_kernels(kind);
#endif
        default: return plain_kernels(kind);
    }
}

// Vectors are few beside the rows that meet them: they become floats, in the order of the rows, once and ahead
// of all rows.
class Floats {
public:
    Floats(Kind const& kind, CpuKernels const& run, Sizes const& sizes) : kind_(kind), run_(run), sizes_(sizes) {}

    void prepare(Vectors& vectors) {
        bool const ready = kind_.vector == DType::f32 && kind_.x != DType::bf16;
        if (vectors.data == nullptr || ready) return;
        int64_t const per_sample = sizes_.M * sizes_.E;
        auto& room = rooms_[used_++];
        room.reset(new float[size_t(sizes_.B * per_sample)]);
        for (int64_t b = 0; b < sizes_.B; ++b) {
            for (int64_t m = 0; m < sizes_.M; ++m) {
                auto const* from = static_cast<char const*>(vectors.data);
                run_.prepare(from + (b * vectors.stride_b + m * vectors.stride_m) * element_size(kind_.vector),
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
    for (Vectors* each : {&params.gate, &params.shift, &params.scale}) floats.prepare(*each);
    int64_t const rows = params.sizes.B * params.sizes.L;
    parallel_for(rows, items_per_piece(rows, params.sizes.E), num_threads,
                 [&](int64_t first, int64_t last) { run.forward_rows(params, first, last); });
}

void backward_cpu(Kind const& kind, BackwardParams params, int num_threads) {
    CpuKernels const run = kernels(kind);
    Floats floats(kind, run, params.sizes);
    for (Vectors* each : {&params.gate, &params.scale}) floats.prepare(*each);
    int64_t const chunks = params.sizes.B * params.chunks;
    parallel_for(chunks, items_per_piece(chunks, params.chunk_rows * params.sizes.E), num_threads,
                 [&](int64_t first, int64_t last) { run.backward_chunks(params, first, last); });
    parallel_for(params.sizes.M * blocks_of(params.sizes.E), 1, num_threads,
                 [&](int64_t first, int64_t last) { run.reduce_blocks(params, first, last); });
}

}  // namespace hunyuan_fast::fused_modulation
