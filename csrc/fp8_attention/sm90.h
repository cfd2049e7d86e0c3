// Attention over e4m3 codes on Hopper: what crosses from the host to the kernel, and its launchers.
#pragma once

#include <cstdint>

namespace hunyuan_fast::fp8_attention {

// Codes as kernels/fp8_attention/reference.py says, contiguous, heads of D = 128 features, Lp a multiple of 128.
struct Codes {
    void const* q = nullptr;  // (B, N, Lp, D)
    void const* k = nullptr;  // (B, N, Lp, D)
    void const* v = nullptr;  // (B, N, D, Lp), tokens at their positions
    float const* q_scale = nullptr;  // (B, N, Lp / 64)
    float const* k_scale = nullptr;  // (B, N, Lp / 128)
    float const* v_scale = nullptr;  // (B, N, D)
    float const* v_mean = nullptr;   // (B, N, D)
};

struct HopperParams {
    int B = 0;
    int L = 0;
    int N = 0;
    int Lp = 0;
    Codes codes;
    // The first lengths[b * step] tokens of sample b take part, clamped to [0, L]; null: all of them. Of 64-bit
    // lengths the low halves.
    int32_t const* lengths = nullptr;
    int64_t lengths_step = 0;
    // (B, L, N, D) with adjacent features; strides in elements. Rows begin at even ones.
    void* out = nullptr;
    int64_t stride_b = 0;
    int64_t stride_l = 0;
    int64_t stride_n = 0;
};

void run_hopper_bf16(HopperParams const& params, void* stream);
void run_hopper_f16(HopperParams const& params, void* stream);
void run_hopper_f32(HopperParams const& params, void* stream);

}  // namespace hunyuan_fast::fp8_attention
