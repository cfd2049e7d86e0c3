#include "fused_modulation/backward.cuh"

namespace hunyuan_fast::fused_modulation {

void backward_f16(BackwardParams const& params, Modulation modulation, Launch const& launch) {
    if (modulation == Modulation::f32) return backward<__half, float>(params, launch);
    backward<__half, __half>(params, launch);
}

}  // namespace hunyuan_fast::fused_modulation
