// What crosses from the host to the kernels: pointers, sizes, strides in elements.  No torch, no pybind11.
#pragma once

#include <cstdint>

namespace hunyuan_fast::fused_modulation {

// (B, L, E) with contiguous last dimension.
struct Rows {
    void* data = nullptr;
    int64_t stride_b = 0;
    int64_t stride_l = 0;
};

// (B, E) with contiguous last dimension.
struct Vectors {
    void* data = nullptr;
    int64_t stride_b = 0;
};

struct Sizes {
    int64_t B = 0;
    int64_t L = 0;
    int64_t E = 0;
};

// y = (x - mean) * rstd * (1 + scale) + shift.
struct ForwardParams {
    Sizes sizes;
    Rows x;
    Rows y;
    Vectors shift;
    Vectors scale;
    float* mean = nullptr;  // (B, L), contiguous
    float* rstd = nullptr;  // (B, L), contiguous
    double eps = 0;
};

// dx, and the sums over L of dy (dshift) and of dy * (x - mean) * rstd (dscale).
struct BackwardParams {
    Sizes sizes;
    Rows dy;
    Rows x;
    Rows dx;
    Vectors scale;
    float const* mean = nullptr;  // (B, L), contiguous
    float const* rstd = nullptr;  // (B, L), contiguous
    float* partials = nullptr;    // (B, chunks, 2, E), contiguous: dshift and dscale of each chunk of rows
    int64_t chunks = 0;           // per sample
    int64_t chunk_rows = 0;
    float* dshift = nullptr;      // (B, E), contiguous
    float* dscale = nullptr;      // (B, E), contiguous
};

}  // namespace hunyuan_fast::fused_modulation
