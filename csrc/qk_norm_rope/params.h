// What crosses from the host to the kernels: pointers, sizes, strides in elements.  No torch, no pybind11.
#pragma once

#include <cstdint>

namespace hunyuan_fast::qk_norm_rope {

// The tables and weights of a row wait for its heads in buffers of this many floats.
constexpr int64_t kMaxD = 512;
constexpr int kMaxStreams = 2;

// L counts the rows of the joint sequence, of which the first L_video are rotated.
struct Sizes {
    int64_t B = 0;
    int64_t L = 0;
    int64_t N = 0;
    int64_t D = 0;
    int64_t L_video = 0;
};

// (B, rows, 3 N D), features ordered (q, k or v; head; feature), with contiguous last dimension.
struct Packed {
    void* data = nullptr;
    int64_t stride_b = 0;
    int64_t stride_l = 0;
};

// (B, L, N, D) with contiguous last dimension.
struct Heads {
    void* data = nullptr;
    int64_t stride_b = 0;
    int64_t stride_l = 0;
    int64_t stride_n = 0;
};

// (L_video, D) with contiguous last dimension, of which the even features are read.
struct Table {
    float const* data = nullptr;
    int64_t stride_l = 0;
};

// Rows of one origin: those of the joint sequence from `first` on, up to the next stream or the end.
struct Stream {
    int64_t first = 0;
    Packed qkv;
    Packed dqkv;                      // backward only
    bool streams = false;             // dqkv is written past the caches
    float const* weights[2] = {};     // (D,) of q and of k
};

struct Inputs {
    Sizes sizes;
    int streams = 0;
    Stream stream[kMaxStreams];
    Table cos;
    Table sin;
    double eps = 0;
};

// q = rotate(x / rms(x) * weight), k alike, v copied.
struct ForwardParams : Inputs {
    Heads out[3];  // q, k, v; q may be missing, with null for its data
    bool streams = false;  // past the caches
};

// dqkv of every stream, and the sums over rows and heads for the weights.
struct BackwardParams : Inputs {
    Heads gradient[3];           // of q, k, v
    float* partials = nullptr;   // (chunks, streams, 2, D), contiguous: the weights' of each chunk of rows
    int64_t chunks = 0;
    int64_t chunk_rows = 0;
    float* dweights = nullptr;   // (streams, 2, D), contiguous
};

}  // namespace hunyuan_fast::qk_norm_rope
