// The real sources of Hopper's attention over codes, for the emulated machine.
#include "common/sm90_tensor_map.cu"
#include "fp8_attention/sm90_forward.cuh"

using namespace hunyuan_fast;
using namespace hunyuan_fast::fp8_attention;

extern "C" {

// numbers: B, L, N, Lp, bytes of an output, whether those are fp16, words from length to length, strides of b, l, n.
char const* fp8_attention_forward(void* q, void* q_scale, void* k, void* k_scale, void* v, void* v_scale, void* v_mean,
                                  void* lengths, void* out, int64_t const* numbers) {
    HopperParams p;
    p.B = int(numbers[0]), p.L = int(numbers[1]), p.N = int(numbers[2]), p.Lp = int(numbers[3]);
    auto const floats = [](void* x) { return static_cast<float const*>(x); };
    p.codes = {q, k, v, floats(q_scale), floats(k_scale), floats(v_scale), floats(v_mean)};
    p.lengths = static_cast<int32_t const*>(lengths), p.lengths_step = numbers[6];
    p.out = out, p.stride_b = numbers[7], p.stride_l = numbers[8], p.stride_n = numbers[9];
    auto const run = numbers[4] == 4 ? run_hopper<float> : numbers[5] ? run_hopper<__half> : run_hopper<__nv_bfloat16>;
    return hopper::attempt([&] { run(p, nullptr); });
}

// The code of a number.
int fp8_attention_code(double x) { return int(sm90::e4m3(float(x))); }

}  // extern "C"
