// What crosses from the host to the kernels: pointers, sizes, strides in elements.  No torch, no pybind11.
//
// A call has a gate half (y, gate), a norm half (shift, scale), or both.  What it has not is null.
#pragma once

#include <cstdint>

namespace hunyuan_fast::fused_modulation {

// (B, L, E) with contiguous last dimension.
struct Rows {
    void* data = nullptr;
    int64_t stride_b = 0;
    int64_t stride_l = 0;
};

// (B, E), or M of them per sample: (B, M, E).  Contiguous last dimension.
struct Vectors {
    void* data = nullptr;
    int64_t stride_b = 0;
    int64_t stride_m = 0;
};

// (B, L): which of the M vectors of its sample a token meets; null when there is one.
struct Index {
    void const* data = nullptr;
    bool wide = false;  // int64, or int32
    int64_t stride_b = 0;
    int64_t stride_l = 0;

    int64_t operator()(int64_t b, int64_t l) const {
        if (data == nullptr) return 0;
        int64_t const at = b * stride_b + l * stride_l;
        return wide ? static_cast<int64_t const*>(data)[at] : static_cast<int32_t const*>(data)[at];
    }
};

struct Sizes {
    int64_t B = 0;
    int64_t L = 0;
    int64_t E = 0;
    int64_t M = 1;
};

// residual = x + gate * y, or x;  modulated = (residual - mean) * rstd * (1 + scale) + shift.
struct ForwardParams {
    Sizes sizes;
    Rows x;
    Rows y;
    Rows residual;
    Rows modulated;
    Vectors gate;
    Vectors shift;
    Vectors scale;
    Index index;
    float* mean = nullptr;  // (B, L), contiguous
    float* rstd = nullptr;  // (B, L), contiguous
    double eps = 0;
    bool streams = false;  // residual and modulated are written past the caches
};

// dx and dy, and the sums over the tokens of a vector: of dmodulated (dshift), of
// dmodulated * (residual - mean) * rstd (dscale) and of dx * y (dgate).
struct BackwardParams {
    Sizes sizes;
    Rows dresidual;
    Rows dmodulated;
    Rows residual;
    Rows y;   // null: dgate is not wanted
    Rows dx;  // null without the norm half: dresidual is it
    Rows dy;  // null: not wanted
    Vectors gate;
    Vectors scale;
    Index index;
    float const* mean = nullptr;  // (B, L), contiguous
    float const* rstd = nullptr;  // (B, L), contiguous
    // (B, chunks, sums, M, E), contiguous: of each chunk of rows dshift and dscale, then dgate, as wanted
    float* partials = nullptr;
    int64_t sums = 0;
    int64_t chunks = 0;  // per sample
    int64_t chunk_rows = 0;
    void* dshift = nullptr;  // (B, M, E), contiguous
    void* dscale = nullptr;  // (B, M, E), contiguous
    void* dgate = nullptr;   // (B, M, E), contiguous
    bool streams = false;    // dx and dy are written past the caches
};

}  // namespace hunyuan_fast::fused_modulation
