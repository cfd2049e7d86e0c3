// The real sources of Hopper's attention with norm and rotation of its queries, for the emulated machine.
#include "common/sm90_tensor_map.cu"
#include "rope3d_attention/sm90_forward.cuh"

namespace {

using namespace hunyuan_fast;
using namespace hunyuan_fast::rope3d_attention;

Rows rows_of(void* data, int64_t const* strides) { return {data, strides[0], strides[1], strides[2]}; }

RawRows raw_of(void const* data, int64_t const* strides, float const* weight) {
    return {data, strides[0], int(strides[1]), weight};
}

}  // namespace

extern "C" {

// numbers: B, L, N, D, blocks of a cluster, whether fp16, words from length to length, the first row of the second
// stream, rows with angles, stride of the tables; then the strides of b and l of both streams, and those of b, l and n
// of k, v and out.
char const* attention_raw(void* video, void* text, float const* video_weight, float const* text_weight,
                          float const* cos, float const* sin, void* k, void* v, void* lengths, void* out, void* lse,
                          double scale, double eps, int64_t const* numbers) {
    HopperParams p;
    p.B = int(numbers[0]), p.L = p.keys = int(numbers[1]), p.N = int(numbers[2]), p.D = int(numbers[3]);
    p.cluster = int(numbers[4]), p.key_tile = 176, p.scale = float(scale);
    p.lengths = {static_cast<int32_t const*>(lengths), numbers[6]};
    p.k = rows_of(k, numbers + 14), p.v = rows_of(v, numbers + 17), p.out = rows_of(out, numbers + 20);
    p.lse = static_cast<float*>(lse);
    RawQueries raw;
    raw.stream[0] = raw_of(video, numbers + 10, video_weight);
    raw.stream[1] = text == nullptr ? raw.stream[0] : raw_of(text, numbers + 12, text_weight);
    raw.second = int(numbers[7]), raw.rotated = int(numbers[8]), raw.stride_table = int(numbers[9]);
    raw.cos = cos, raw.sin = sin, raw.eps = float(eps);
    bool const half = numbers[5] != 0;
    return hopper::attempt(
        [&] { half ? run_hopper_raw<__half>(p, raw, nullptr) : run_hopper_raw<__nv_bfloat16>(p, raw, nullptr); });
}

}  // extern "C"
