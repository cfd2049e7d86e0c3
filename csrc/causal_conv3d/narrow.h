// A convolution to so few outputs, such as those of a pixel, that a vector of them would be mostly empty: vectors of
// channels instead, whose lanes are added up at the end.
#pragma once

#include "causal_conv3d/tile.h"

namespace hunyuan_fast::causal_conv3d::HUNYUAN_FAST_ISA {

constexpr int64_t kFewOutputs = 4;
// Positions in a group: sums of 4 outputs for each take 24 of 32 registers with AVX-512, else 12 of 16.
constexpr int kNarrowRows = kLanes == 16 ? 6 : 3;

inline bool is_narrow(int64_t O, int64_t C) { return O <= kFewOutputs && C % kLanes == 0; }

inline float sum_of(Vec v) {
    float lanes[kLanes];
    store_as(lanes, v);
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

// Weights are (O, taps, C).
template <int kO>
inline void narrow_group(Params const& p, Tile const& tile, int64_t i) {
    int64_t const taps = p.kernel.count(), of_output = taps * p.C;
    Vec sums[kNarrowRows][kO] = {};
    for (int64_t tap = 0; tap < taps; ++tap) {
        float const* x[kNarrowRows];
        for (int r = 0; r < kNarrowRows; ++r) x[r] = tile.inputs[tap][i + r];
        float const* const w = p.weights + tap * p.C;
        for (int64_t c = 0; c < p.C; c += kLanes) {
            Vec weights[kO];
            for (int o = 0; o < kO; ++o) weights[o] = load_as<Vec>(w + o * of_output + c);
            for (int r = 0; r < kNarrowRows; ++r) {
                Vec const values = load_as<Vec>(x[r] + c);
                for (int o = 0; o < kO; ++o) sums[r][o] += values * weights[o];
            }
        }
    }
    for (int64_t r = 0; r < least(kNarrowRows, tile.count - i); ++r) {
        float* const y = p.y.data + tile.offset_y[i + r];
        float const* const residual = p.residual.data ? p.residual.data + tile.offset_residual[i + r] : nullptr;
        for (int o = 0; o < kO; ++o) {
            y[o] = sum_of(sums[r][o]) + (p.bias ? p.bias[o] : 0.0f) + (residual ? residual[o] : 0.0f);
        }
    }
}

template <int kO>
void run_outputs(Params const& p, Tile const& tile) {
    for (int64_t i = 0; i < tile.count; i += kNarrowRows) narrow_group<kO>(p, tile, i);
}

inline void run_narrow(Params const& p, Tile const& tile) {
    switch (p.O) {
        case 1: return run_outputs<1>(p, tile);
        case 2: return run_outputs<2>(p, tile);
        case 3: return run_outputs<3>(p, tile);
        default: return run_outputs<4>(p, tile);
    }
}

}  // namespace hunyuan_fast::causal_conv3d::HUNYUAN_FAST_ISA
