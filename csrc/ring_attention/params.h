// What crosses from the host to the kernels: pointers, sizes, strides in elements.  No torch, no pybind11.
#pragma once

#include <cstdint>

namespace hunyuan_fast::ring_attention {

// Rows of D adjacent elements, for a sample, a token and a head.
struct Rows {
    void* data = nullptr;
    int64_t stride_b = 0;
    int64_t stride_l = 0;
    int64_t stride_n = 0;
};

// One number for each row, in the same order of strides.
struct Numbers {
    float* data = nullptr;
    int64_t stride_b = 0;
    int64_t stride_l = 0;
    int64_t stride_n = 0;
};

struct Sizes {
    int64_t B = 0;
    int64_t L = 0;
    int64_t N = 0;
    int64_t D = 0;

    int64_t rows() const { return B * L * N; }
};

// out and lse of both parts, see kernels/ring_attention; the results may be out and lse themselves.
struct ForwardParams {
    Sizes size;
    Rows out, part, new_out;
    Numbers lse, part_lse, new_lse;
};

// dlse may be missing: no data.
struct BackwardParams {
    Sizes size;
    Rows dout, out, part, dfirst, dpart;
    Numbers dlse, lse, part_lse, dfirst_lse, dpart_lse;
};

}  // namespace hunyuan_fast::ring_attention
