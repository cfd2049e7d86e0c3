#include "rope3d_attention/sm90_backward.cuh"

namespace hunyuan_fast::rope3d_attention {

void run_backward_bf16(BackwardParams const& params, void* stream) { run_backward<__nv_bfloat16>(params, stream); }

}  // namespace hunyuan_fast::rope3d_attention
