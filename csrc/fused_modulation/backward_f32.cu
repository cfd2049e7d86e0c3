#include "fused_modulation/backward.cuh"

namespace hunyuan_fast::fused_modulation {

void backward_f32(BackwardParams const& params, Modulation, Launch const& launch) {
    backward<float, float>(params, launch);
}

}  // namespace hunyuan_fast::fused_modulation
