#include "fused_modulation/forward.cuh"

namespace hunyuan_fast::fused_modulation {

void forward_bf16(ForwardParams const& params, Modulation modulation, Launch const& launch) {
    if (modulation == Modulation::f32) return forward<__nv_bfloat16, float>(params, launch);
    forward<__nv_bfloat16, __nv_bfloat16>(params, launch);
}

}  // namespace hunyuan_fast::fused_modulation
