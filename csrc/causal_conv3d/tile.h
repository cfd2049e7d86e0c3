// What a box of output positions reads and writes.
#pragma once

#include "causal_conv3d/window.h"

namespace hunyuan_fast::causal_conv3d::HUNYUAN_FAST_ISA {

// Vectors of outputs in a full block, and positions in a group: with AVX-512 24 of the 32 registers hold sums,
// else 12 of 16. Narrow blocks take more positions, for a register is free for its next sum after some cycles.
constexpr int kVectors = kLanes == 16 ? 4 : 2;
constexpr int rows_for(int vectors) { return vectors == kVectors ? 6 : 8; }
constexpr int64_t kMaxTaps = 27;
// A box: where its positions are written, and what each tap reads for each of them.
struct Tile {
    int64_t count = 0;
    int64_t offset_y[kTile];
    int64_t offset_residual[kTile];
    // [tap][position]
    float const* inputs[kMaxTaps][kTile];
    alignas(64) float sums[kTile * kVectors * kLanes];
};

inline int64_t offset(Map const& map, int64_t b, int64_t t, int64_t h, int64_t w) {
    return b * map.stride_b + t * map.stride_t + h * map.stride_h + w * map.stride_w;
}

// What a tap of offset (kt, kh, kw) reads for each position of the range.
inline void read_at(Params const& p, Range const& r, Window const& window, int64_t kt, int64_t kh, int64_t kw,
                    float const** inputs) {
    for (int64_t t = r.begin.t; t < r.end.t; ++t) {
        int64_t const time = t * p.stride.t + kt - p.origin.t;
        Frame const frame = p.scale ? window.frame(p, time) : frame_of(p, r.b, time);
        int64_t columns[kTile];
        int64_t const width = r.end.w - r.begin.w;
        for (int64_t i = 0; i < width; ++i) {
            int64_t const column = clamp((r.begin.w + i) * p.stride.w + kw - p.origin.w, p.in.w);
            columns[i] = (column - frame.column) * frame.stride_w;
        }
        for (int64_t h = r.begin.h; h < r.end.h; ++h, inputs += width) {
            float const* const row = frame.at(clamp(h * p.stride.h + kh - p.origin.h, p.in.h));
            for (int64_t i = 0; i < width; ++i) inputs[i] = row + columns[i];
        }
    }
}

inline void lay_out(Params const& p, int64_t index, Window& window, Tile& tile) {
    Range const r = range_of(p, index);
    if (p.scale) window.move(p, r);
    tile.count = 0;
    for (int64_t t = r.begin.t; t < r.end.t; ++t) {
        for (int64_t h = r.begin.h; h < r.end.h; ++h) {
            for (int64_t w = r.begin.w; w < r.end.w; ++w, ++tile.count) {
                tile.offset_y[tile.count] = offset(p.y, r.b, t, h, w);
                tile.offset_residual[tile.count] = offset(p.residual, r.b, t, h, w);
            }
        }
    }
    int64_t tap = 0;
    for (int64_t kt = 0; kt < p.kernel.t; ++kt) {
        for (int64_t kh = 0; kh < p.kernel.h; ++kh) {
            for (int64_t kw = 0; kw < p.kernel.w; ++kw, ++tap) {
                float const** const inputs = tile.inputs[tap];
                read_at(p, r, window, kt, kh, kw, inputs);
                // groups are whole: what is beyond the last position reads what that one does
                for (int64_t i = tile.count; i < least(tile.count + 8, kTile); ++i) inputs[i] = inputs[tile.count - 1];
            }
        }
    }
}

}  // namespace hunyuan_fast::causal_conv3d::HUNYUAN_FAST_ISA
