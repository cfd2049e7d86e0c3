#include "fp8_attention/sm90_forward.cuh"

namespace hunyuan_fast::fp8_attention {

void run_hopper_f32(HopperParams const& params, void* stream) { run_hopper<float>(params, stream); }

}  // namespace hunyuan_fast::fp8_attention
