// The real sources of Hopper's attention, for the emulated machine.
#include "common/sm90_tensor_map.cu"
#include "rope3d_attention/sm90_forward.cuh"

namespace {

using namespace hunyuan_fast;
using namespace hunyuan_fast::rope3d_attention;

Rows rows_of(void* data, int64_t const* strides) { return {data, strides[0], strides[1], strides[2]}; }

}  // namespace

extern "C" {

// numbers: B, L, N, D, key_tile, whether fp16, words from length to length, then the strides
// of b, l and n of q, k, v and out, blocks of a cluster, rows of k and v, words from number to number of `queries`,
// which are those of queries of their own.
char const* attention_forward(void* q, void* k, void* v, void* lengths, void* queries, void* out, void* lse,
                              double scale, int64_t const* numbers) {
    HopperParams p;
    p.B = int(numbers[0]), p.L = int(numbers[1]), p.N = int(numbers[2]), p.D = int(numbers[3]);
    p.key_tile = int(numbers[4]), p.cluster = int(numbers[19]), p.scale = float(scale);
    p.keys = int(numbers[20]);
    p.lengths = {static_cast<int32_t const*>(lengths), numbers[6]};
    p.queries = {static_cast<int32_t const*>(queries), numbers[21]};
    p.q = rows_of(q, numbers + 7), p.k = rows_of(k, numbers + 10), p.v = rows_of(v, numbers + 13);
    p.out = rows_of(out, numbers + 16), p.lse = static_cast<float*>(lse);
    bool const half = numbers[5] != 0;
    return hopper::attempt([&] { half ? run_hopper<__half>(p, nullptr) : run_hopper<__nv_bfloat16>(p, nullptr); });
}

}  // extern "C"
