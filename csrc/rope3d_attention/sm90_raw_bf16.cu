#include "rope3d_attention/sm90_forward.cuh"

namespace hunyuan_fast::rope3d_attention {

void run_hopper_raw_bf16(HopperParams const& params, RawQueries const& queries, void* stream) {
    run_hopper_raw<__nv_bfloat16>(params, queries, stream);
}

}  // namespace hunyuan_fast::rope3d_attention
