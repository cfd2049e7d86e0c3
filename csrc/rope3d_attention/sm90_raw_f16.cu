#include "rope3d_attention/sm90_forward.cuh"

namespace hunyuan_fast::rope3d_attention {

void run_hopper_raw_f16(HopperParams const& params, RawQueries const& queries, void* stream) {
    run_hopper_raw<__half>(params, queries, stream);
}

}  // namespace hunyuan_fast::rope3d_attention
