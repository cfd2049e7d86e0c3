// What crosses from the host to the kernels: pointers, sizes, strides in elements.  No torch, no pybind11.
#pragma once

#include <cstdint>
#include <vector>

namespace hunyuan_fast::causal_conv3d {

// (B, T, H, W, C) with contiguous last dimension.
struct Map {
    float* data = nullptr;
    int64_t stride_b = 0;
    int64_t stride_t = 0;
    int64_t stride_h = 0;
    int64_t stride_w = 0;
};

struct Size {
    int64_t t = 0;
    int64_t h = 0;
    int64_t w = 0;

    int64_t count() const { return t * h * w; }
};

// y(b, o, :) = bias + sum over taps k of weight(:, :, k) x(b, o * stride + k - origin, :) + residual(b, o, :).
// A coordinate outside is that of the nearest edge, of x or, where there is a past, of its frames before x.
struct Params {
    int64_t B = 0;
    int64_t C = 0;
    int64_t O = 0;
    Size in;
    Size out;
    Size kernel;
    Size stride;
    Size origin;
    int64_t past_frames = 0;
    Map x;
    Map past;
    Map y;
    Map residual;                   // null: none
    float const* weights = nullptr;  // packed, see Packing
    float const* bias = nullptr;     // (O,), or null
    float const* scale = nullptr;    // (B, C), or null: x and past are read as they are,
    float const* shift = nullptr;    // else as silu(x * scale + shift)
};

// Boxes of output positions that are worked on together, and how many of them fill a sample. A box that is about as
// high as it is wide reads the least input around itself.
struct Boxes {
    Size box;
    Size number;
};

// Weights in the order in which a kernel reads them: blocks of `lanes` outputs, (blocks, taps, C, lanes), zero
// beyond O. Blocks of one output are read by vectors of channels.
struct Packing {
    int64_t lanes = 0;
    int64_t blocks = 0;
};

// Taps [begin, end) along one axis.
struct Span {
    int64_t begin = 0;
    int64_t end = 0;
};

// weight(o, c, k): any strides. A tap of the kernel is the sum of those in a span of each axis.
struct Weights {
    float const* data = nullptr;
    int64_t stride_o = 0;
    int64_t stride_c = 0;
    int64_t stride_t = 0;
    int64_t stride_h = 0;
    int64_t stride_w = 0;
    std::vector<Span> t;
    std::vector<Span> h;
    std::vector<Span> w;
};

}  // namespace hunyuan_fast::causal_conv3d
