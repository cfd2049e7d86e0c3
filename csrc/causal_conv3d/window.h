// What a box reads, through the norm and the SiLU before the convolution.
#pragma once

#include "causal_conv3d/cpu.h"
#include "common/simd_math.h"

namespace hunyuan_fast::causal_conv3d::HUNYUAN_FAST_ISA {

using namespace hunyuan_fast::HUNYUAN_FAST_ISA;

inline int64_t clamp(int64_t i, int64_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Output positions [begin, end) of a sample.
struct Range {
    int64_t b;
    Size begin;
    Size end;
};

// Boxes that follow each other in time have adjacent numbers: they read most of the same frames.
inline Range range_of(Params const& p, int64_t index) {
    auto const [box, number] = boxes_of(p.out);
    Range r;
    r.b = index / number.count();
    r.begin.t = index % number.t * box.t;
    r.begin.w = index / number.t % number.w * box.w;
    r.begin.h = index / (number.t * number.w) % number.h * box.h;
    r.end = {least(r.begin.t + box.t, p.out.t), least(r.begin.h + box.h, p.out.h), least(r.begin.w + box.w, p.out.w)};
    return r;
}

// Rows and columns of a frame, counted from a first one.
struct Frame {
    float const* data = nullptr;
    int64_t stride_h = 0;
    int64_t stride_w = 0;
    int64_t row = 0;
    int64_t column = 0;

    float const* at(int64_t h) const { return data + (h - row) * stride_h; }
};

// The frame that stands at time t, which is negative before x.
inline int64_t frame_at(Params const& p, int64_t t) {
    int64_t const before = p.past.data ? p.past_frames : 0;
    return clamp(t + before, before + p.in.t) - before;
}

inline Frame frame_of(Params const& p, int64_t b, int64_t t) {
    int64_t const at = frame_at(p, t);
    Map const& map = at < 0 ? p.past : p.x;
    int64_t const index = at < 0 ? at + p.past_frames : at;
    return {map.data + b * map.stride_b + index * map.stride_t, map.stride_h, map.stride_w};
}

// The inputs of a box after silu(x * scale + shift), in memory of its own: whole rows of channels. A frame has the
// place of its number modulo the frames of a window, so that the next box in time finds most of its frames there.
class Window {
public:
    explicit Window(float* room) : room_(room) {}

    void move(Params const& p, Range const& r) {
        Size const begin = {first(r.begin.t, p.stride.t, p.origin.t), first(r.begin.h, p.stride.h, p.origin.h),
                            first(r.begin.w, p.stride.w, p.origin.w)};
        Size const end = {last(r.end.t, p.stride.t, p.origin.t, p.kernel.t),
                          last(r.end.h, p.stride.h, p.origin.h, p.kernel.h),
                          last(r.end.w, p.stride.w, p.origin.w, p.kernel.w)};
        int64_t const row = clamp(begin.h, p.in.h), column = clamp(begin.w, p.in.w);
        Size const size = {window_of(p).t, clamp(end.h, p.in.h) - row + 1, clamp(end.w, p.in.w) - column + 1};
        bool const moved = r.b != b_ || row != row_ || column != column_ || size.h != size_.h || size.w != size_.w;
        b_ = r.b, row_ = row, column_ = column, size_ = size;
        int64_t t = frame_at(p, begin.t);
        int64_t const until = frame_at(p, end.t);
        if (!moved && held_from_ <= t && t <= held_) t = held_ + 1;
        held_from_ = frame_at(p, begin.t);
        for (; t <= until; ++t) fill(p, t);
        held_ = until;
    }

    Frame frame(Params const& p, int64_t t) const {
        int64_t const at = (frame_at(p, t) + p.past_frames) % size_.t;
        return {room_ + at * size_.h * size_.w * p.C, size_.w * p.C, p.C, row_, column_};
    }

private:
    static int64_t first(int64_t o, int64_t stride, int64_t origin) { return o * stride - origin; }
    static int64_t last(int64_t end, int64_t stride, int64_t origin, int64_t taps) {
        return (end - 1) * stride - origin + taps - 1;
    }

    void fill(Params const& p, int64_t t) const {
        Frame const from = frame_of(p, b_, t);
        float* to = const_cast<float*>(frame(p, t).data);
        float const* scale = p.scale + b_ * p.C;
        float const* shift = p.shift + b_ * p.C;
        for (int64_t h = row_; h < row_ + size_.h; ++h) {
            for (int64_t w = column_; w < column_ + size_.w; ++w, to += p.C) {
                activate(from.at(h) + w * from.stride_w, scale, shift, to, p.C);
            }
        }
    }

    static void activate(float const* x, float const* scale, float const* shift, float* to, int64_t C) {
        int64_t c = 0;
        for (; c + kLanes <= C; c += kLanes) {
            Vec const z = load_as<Vec>(x + c) * load_as<Vec>(scale + c) + load_as<Vec>(shift + c);
            store_as(to + c, silu<false>(z));
        }
        if (c < C) {
            Float32 const type;
            int64_t const rest = C - c;
            Vec const z = load_tail(type, x + c, rest) * load_tail(type, scale + c, rest) + load_tail(type, shift + c, rest);
            store_tail(type, to + c, silu<false>(z), rest);
        }
    }

    float* room_;
    int64_t b_ = -1;
    int64_t row_ = 0;
    int64_t column_ = 0;
    Size size_;
    // Frames [held_from_, held_] are in their places.
    int64_t held_from_ = 0;
    int64_t held_ = -1;
};

}  // namespace hunyuan_fast::causal_conv3d::HUNYUAN_FAST_ISA
