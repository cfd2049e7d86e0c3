#include "fused_modulation/backward.cuh"

namespace hunyuan_fast::fused_modulation {

void backward_bf16(BackwardParams const& params, Modulation modulation, Launch const& launch) {
    if (modulation == Modulation::f32) return backward<__nv_bfloat16, float>(params, launch);
    backward<__nv_bfloat16, __nv_bfloat16>(params, launch);
}

}  // namespace hunyuan_fast::fused_modulation
