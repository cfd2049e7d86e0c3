// The launchers of the CUDA kernels: the norm half, with one vector per sample. One pair per element type,
// each in a file of its own.
#pragma once

#include "common/tensor_view.h"
#include "fused_modulation/params.h"

namespace hunyuan_fast::fused_modulation {

// One block per row, or per chunk of rows in backward; `vectors` of 16 bytes per thread, 1 to 4.
struct Launch {
    int threads = 0;
    int vectors = 0;
    void* stream = nullptr;
};

// Whether shift and scale are float32, or of the element type of x.
enum class Modulation { as_x, f32 };

void forward_f32(ForwardParams const& params, Modulation modulation, Launch const& launch);
void forward_f16(ForwardParams const& params, Modulation modulation, Launch const& launch);
void forward_bf16(ForwardParams const& params, Modulation modulation, Launch const& launch);

void backward_f32(BackwardParams const& params, Modulation modulation, Launch const& launch);
void backward_f16(BackwardParams const& params, Modulation modulation, Launch const& launch);
void backward_bf16(BackwardParams const& params, Modulation modulation, Launch const& launch);

}  // namespace hunyuan_fast::fused_modulation
