// The real sources of the Hopper convolution, for the emulated machine. bf16.
#include "causal_conv3d/sm90_forward.cuh"
#include "causal_conv3d/sm90_pack.cu"

namespace {

using namespace hunyuan_fast::causal_conv3d;

Rows rows_of(void* data, int64_t const* strides) { return {data, strides[0], strides[1], strides[2], strides[3]}; }
Extent extent_of(int64_t const* n) { return {int(n[0]), int(n[1]), int(n[2])}; }

}  // namespace

extern "C" {

// numbers: O, C, strides of the weight (5), the kernel (3), then of every axis 27 beginnings and 27 ends of spans.
char const* pack(void const* weight, void* packed, int64_t const* numbers) {
    HopperWeights w;
    w.data = weight, w.O = int(numbers[0]), w.C = int(numbers[1]), w.kernel = extent_of(numbers + 7);
    w.stride_o = numbers[2], w.stride_c = numbers[3];
    for (int axis = 0; axis < 3; ++axis) {
        w.strides[axis] = numbers[4 + axis];
        for (int tap = 0; tap < 27; ++tap) {
            int64_t const* const begin = numbers + 10 + axis * 54 + tap;
            w.spans[axis][tap] = {int8_t(begin[0]), int8_t(begin[27])};
        }
    }
    return hopper::attempt([&] { pack_hopper_bf16(w, packed, nullptr); });
}

// numbers: B, C, O, frames of past, then (t, h, w) of x, y, kernel, stride and origin, then the strides (b, t, h, w) of
// x, past, y and residual.
char const* forward(void* x, void* past, void* y, void* residual, void const* packed, void const* bias,
                    int64_t const* numbers) {
    HopperParams p;
    p.C = int(numbers[1]), p.O = int(numbers[2]), p.past_frames = int(numbers[3]);
    p.in = extent_of(numbers + 4), p.out = extent_of(numbers + 7), p.kernel = extent_of(numbers + 10);
    p.stride = extent_of(numbers + 13), p.origin = extent_of(numbers + 16);
    p.positions = uint32_t(numbers[0] * p.out.t * p.out.h * p.out.w);
    p.x = rows_of(x, numbers + 19), p.past = rows_of(past, numbers + 23);
    p.y = rows_of(y, numbers + 27), p.residual = rows_of(residual, numbers + 31);
    p.weights = packed, p.bias = bias;
    return hopper::attempt([&] { run_hopper<__nv_bfloat16>(p, nullptr); });
}

}  // extern "C"
