#include "fused_modulation/forward.cuh"

namespace hunyuan_fast::fused_modulation {

void forward_f32(ForwardParams const& params, Modulation, Launch const& launch) {
    forward<float, float>(params, launch);
}

}  // namespace hunyuan_fast::fused_modulation
