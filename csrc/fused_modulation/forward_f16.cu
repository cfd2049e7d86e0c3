#include "fused_modulation/forward.cuh"

namespace hunyuan_fast::fused_modulation {

void forward_f16(ForwardParams const& params, Modulation modulation, Launch const& launch) {
    if (modulation == Modulation::f32) return forward<__half, float>(params, launch);
    forward<__half, __half>(params, launch);
}

}  // namespace hunyuan_fast::fused_modulation
