// Eight-bit numbers: "cvt" of the PTX ISA 9.0.
#pragma once

#include "common/sm90.cuh"

namespace hunyuan_fast::sm90 {

#ifdef HUNYUAN_SM90A

// Four numbers rounded to nearest e4m3, the largest of which stands for all above it; `a` in bits 0 to 7.
__device__ inline uint32_t pack_e4m3(float a, float b, float c, float d) {
    uint32_t all;
    asm("{ .reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high}; }"
        : "=r"(all)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return all;
}

#endif  // HUNYUAN_SM90A

}  // namespace hunyuan_fast::sm90
