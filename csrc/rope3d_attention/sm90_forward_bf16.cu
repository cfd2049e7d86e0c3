#include "rope3d_attention/sm90_forward.cuh"

namespace hunyuan_fast::rope3d_attention {

void run_hopper_bf16(HopperParams const& params, void* stream) { run_hopper<__nv_bfloat16>(params, stream); }

}  // namespace hunyuan_fast::rope3d_attention
