// Attention on Hopper: what crosses from the host to the kernels, and their launchers. bf16 and fp16.
#pragma once

#include <cstdint>

namespace hunyuan_fast::rope3d_attention {

// (B, L, N, D) with adjacent features; strides in elements. Rows begin at multiples of 16 bytes.
struct Rows {
    void* data = nullptr;
    int64_t stride_b = 0;
    int64_t stride_l = 0;
    int64_t stride_n = 0;
};

// Of sample b the first lengths[b] of so many rows take part, clamped to [0, rows].
struct Lengths {
    int32_t const* data = nullptr;  // null: all of them. Of 64-bit lengths the low halves
    int64_t step = 0;               // from one to the next, in 32-bit words
};

struct HopperParams {
    int B = 0;
    int L = 0;     // rows of q and out
    int keys = 0;  // rows of k and v
    int N = 0;
    int D = 0;  // 64 or 128
    float scale = 0;  // of the scores, positive
    Lengths lengths;  // of the keys, and of the queries where those are not given
    Lengths queries;  // of queries of their own; where they are not, `keys` is L
    Rows q;
    Rows k;
    Rows v;
    Rows out;
    float* lse = nullptr;  // (B, N, L)
    int key_tile = 0;      // how many keys a step takes: 128 or 176
    int cluster = 1;       // how many thread blocks share the tiles of keys that they fetch: 1 or 2
};

// Rows of a packed projection, (B, rows, N, D) with adjacent heads, and the norm that they have yet to go through.
struct RawRows {
    void const* data = nullptr;
    int64_t stride_b = 0;
    int stride_l = 0;
    float const* weight = nullptr;  // (D,)
};

// Queries before norm and rotation, in the place of `q`. Row `second` of the joint sequence is the first one of the
// second stream; where there is one stream only, that is L, and the second is the same. Tables are (rotated, D), of
// which even features are read; they lie within 2^31 elements.
struct RawQueries {
    RawRows stream[2];
    int second = 0;
    int rotated = 0;  // the first rows of the joint sequence
    float const* cos = nullptr;
    float const* sin = nullptr;
    int stride_table = 0;  // from row to row, of both
    float eps = 0;
};

void run_hopper_bf16(HopperParams const& params, void* stream);
void run_hopper_f16(HopperParams const& params, void* stream);
// With queries that come raw; the tile of keys is 176.
void run_hopper_raw_bf16(HopperParams const& params, RawQueries const& queries, void* stream);
void run_hopper_raw_f16(HopperParams const& params, RawQueries const& queries, void* stream);

}  // namespace hunyuan_fast::rope3d_attention
