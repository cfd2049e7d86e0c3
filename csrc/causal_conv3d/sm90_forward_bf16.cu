#include "causal_conv3d/sm90_forward.cuh"

namespace hunyuan_fast::causal_conv3d {

void run_hopper_bf16(HopperParams const& params, void* stream) { run_hopper<__nv_bfloat16>(params, stream); }

}  // namespace hunyuan_fast::causal_conv3d
