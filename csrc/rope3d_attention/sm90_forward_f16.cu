#include "rope3d_attention/sm90_forward.cuh"

namespace hunyuan_fast::rope3d_attention {

void run_hopper_f16(HopperParams const& params, void* stream) { run_hopper<__half>(params, stream); }

}  // namespace hunyuan_fast::rope3d_attention
