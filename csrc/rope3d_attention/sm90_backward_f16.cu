#include "rope3d_attention/sm90_backward.cuh"

namespace hunyuan_fast::rope3d_attention {

void run_backward_f16(BackwardParams const& params, void* stream) { run_backward<__half>(params, stream); }

}  // namespace hunyuan_fast::rope3d_attention
