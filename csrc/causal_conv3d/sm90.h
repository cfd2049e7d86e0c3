// The convolution on Hopper: what crosses from the host to the kernels, and their launchers. bf16 and fp16.
#pragma once

#include <cstdint>

#include "causal_conv3d/params.h"

namespace hunyuan_fast::causal_conv3d {

// (B, T, H, W, C) with contiguous last dimension; strides in elements. Rows begin at multiples of 16 bytes.
struct Rows {
    void* data = nullptr;
    int64_t stride_b = 0;
    int64_t stride_t = 0;
    int64_t stride_h = 0;
    int64_t stride_w = 0;
};

struct Extent {
    int t = 0;
    int h = 0;
    int w = 0;
};

// As Params: y(b, o, :) = bias + sum over taps k of weight(:, :, k) x(b, o * stride + k - origin, :) + residual(b, o, :),
// coordinates outside being those of the nearest edge. C and O are multiples of 64, positions less than 2^31.
struct HopperParams {
    int C = 0;
    int O = 0;
    Extent in;
    Extent out;
    Extent kernel;
    Extent stride;
    Extent origin;
    int past_frames = 0;
    uint32_t positions = 0;         // B T' H' W'
    Rows x;
    Rows past;
    Rows y;
    Rows residual;                  // null: none
    void const* weights = nullptr;  // packed
    void const* bias = nullptr;     // (O,), or null
};

// Which taps of a weight, (O, C, KT, KH, KW) of any strides, each tap of the packed kernel adds up, by axis.
struct HopperWeights {
    struct Span {
        int8_t begin = 0;
        int8_t end = 0;
    };

    void const* data = nullptr;
    int64_t stride_o = 0;
    int64_t stride_c = 0;
    int64_t strides[3] = {};
    int O = 0;
    int C = 0;
    Extent kernel;       // packed
    Span spans[3][27];
};

void pack_hopper_bf16(HopperWeights const& weights, void* packed, void* stream);
void pack_hopper_f16(HopperWeights const& weights, void* packed, void* stream);
void run_hopper_bf16(HopperParams const& params, void* stream);
void run_hopper_f16(HopperParams const& params, void* stream);

}  // namespace hunyuan_fast::causal_conv3d
