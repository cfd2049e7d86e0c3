// What crosses from the host to the kernels: pointers, sizes, strides in elements.  No torch, no pybind11.
//
// A sample is one row of S C values, S places of C channels each. The channels repeat after a period: a
// multiple of C that is also a whole number of pairs of vectors in every instruction set, so that nothing but
// the end of a sample is ever less than a pair, whatever C is.
#pragma once

#include <cstdint>

namespace hunyuan_fast::group_norm_silu {

struct Sizes {
    int64_t B = 0;
    int64_t S = 0;  // T H W
    int64_t C = 0;
    int64_t G = 0;
    int64_t period = 0;
    int64_t chunk = 0;   // values that are added up in one partial sum, whole periods
    int64_t chunks = 0;  // per sample

    int64_t values() const { return S * C; }  // of a sample
    int64_t channels() const { return C / G; }  // of a group
};

// (B, S, C), of which every sample is contiguous.
struct Maps {
    void* data = nullptr;
    int64_t stride_b = 0;
};

// What the values of a sample meet, a number for each lane of a period. With c = x - centre, whose rounding a large
// mean cannot spoil, the normalised value times weight plus bias is z = c scale + shift, and the gradient of x is
// dz scale + c slope + level.
enum Line { kCentre, kScale, kShift, kSlope, kLevel };
inline constexpr int kLines = 5;

// Of every sample, all lines in the order of the pairs of x, then all lines in consecutive order, for what is left
// at the end of a sample (common/simd_pair.h).
struct Lines {
    float* data = nullptr;  // (B, 2, kLines, period)
    int64_t period = 0;

    float* of(int64_t b, int order, int line) const { return data + ((b * 2 + order) * kLines + line) * period; }
};

struct StatisticsParams {
    Sizes sizes;
    Maps x;
};

// y = z, or z / (1 + exp(-z)).
struct ForwardParams {
    Sizes sizes;
    Maps x;
    Maps y;
    Lines lines;
    bool streams = false;  // y is written past the caches
};

struct BackwardParams {
    Sizes sizes;
    Maps dy;
    Maps x;
    Maps dx;
    Lines lines;
    bool streams = false;  // dx is written past the caches
};

}  // namespace hunyuan_fast::group_norm_silu
