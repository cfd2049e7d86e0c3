#include "causal_conv3d/sm90_forward.cuh"

namespace hunyuan_fast::causal_conv3d {

void run_hopper_f16(HopperParams const& params, void* stream) { run_hopper<__half>(params, stream); }

}  // namespace hunyuan_fast::causal_conv3d
