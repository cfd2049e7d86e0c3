// What crosses from the host to the CPU kernels: pointers, sizes, strides in elements.  No torch, no pybind11.
#pragma once

#include <cstdint>

namespace hunyuan_fast::rope3d_attention {

struct Sizes {
    int64_t B = 0;
    int64_t L = 0;
    int64_t N = 0;
    int64_t D = 0;
};

// (B, L, N, D) with contiguous last dimension.
struct Heads {
    void* data = nullptr;
    int64_t stride_b = 0;
    int64_t stride_l = 0;
    int64_t stride_n = 0;
};

// Queries are tokens of their own where `keys` is not `sizes.L`, or `queries` not `lengths`. In a sample either none of
// both take part, or some of each.
struct Inputs {
    Sizes sizes;                       // of q, and of what is like it
    int64_t keys = 0;                  // L of k, v and their gradients
    float scale = 0;
    int64_t const* lengths = nullptr;  // (B,): valid keys of each sample
    int64_t const* queries = nullptr;  // (B,): valid queries
    Heads q;
    Heads k;
    Heads v;

    Sizes key_sizes() const { return {sizes.B, keys, sizes.N, sizes.D}; }
};

struct ForwardParams : Inputs {
    Heads out;
    float* lse = nullptr;  // (B, N, L), contiguous
};

struct BackwardParams : Inputs {
    Heads dout;
    Heads out;
    float const* lse = nullptr;  // (B, N, L), contiguous
    Heads dq;
    Heads dk;
    Heads dv;
};

}  // namespace hunyuan_fast::rope3d_attention
