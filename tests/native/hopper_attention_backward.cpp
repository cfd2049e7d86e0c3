// The launchers of attention's gradients for Hopper, for Python, on an emulated machine.
#include <cstdint>

#include "common/sm90_tensor_map.cu"
#include "machine/machine.h"
#include "rope3d_attention/sm90_backward.cuh"

namespace {

using namespace hunyuan_fast;
using namespace hunyuan_fast::rope3d_attention;

Rows rows_of(void* data, int64_t const* strides) { return {data, strides[0], strides[1], strides[2]}; }

BackwardParams params_of(int64_t const* sizes) {
    BackwardParams p;
    p.B = int(sizes[0]), p.L = int(sizes[1]), p.N = int(sizes[2]), p.D = int(sizes[3]);
    return p;
}

}  // namespace

extern "C" {

char const* attention_backward_workspace(int64_t const* sizes, int64_t* bytes) {
    *bytes = backward_workspace_bytes(params_of(sizes));
    return nullptr;
}

// Null, or what went wrong. numbers: B, L, N, D, whether fp16, words from length to length, then the strides of b, l
// and n of q, k, v, out, dout, dq, dk and dv, rows of k and v, words from number to number of `queries`, which are those
// of queries of their own.
char const* attention_backward(void* q, void* k, void* v, void* out, void* dout, void* dq, void* dk, void* dv,
                               void* lse, void* lengths, void* queries, void* workspace, double scale, int64_t const* numbers) {
    BackwardParams p = params_of(numbers);
    p.scale = float(scale), p.score_scale = float(scale * double(kLog2E));
    p.lengths = {static_cast<int32_t const*>(lengths), numbers[5]};
    p.keys = int(numbers[30]), p.queries = {static_cast<int32_t const*>(queries), numbers[31]};
    void* const data[] = {q, k, v, out, dout, dq, dk, dv};
    Rows* const rows[] = {&p.q, &p.k, &p.v, &p.out, &p.dout, &p.dq, &p.dk, &p.dv};
    for (int i = 0; i < 8; ++i) *rows[i] = rows_of(data[i], numbers + 6 + 3 * i);
    p.lse = static_cast<float const*>(lse), p.workspace = workspace;
    bool const half = numbers[4] != 0;
    return hopper::attempt([&] { half ? run_backward<__half>(p, nullptr) : run_backward<__nv_bfloat16>(p, nullptr); });
}

}  // extern "C"
