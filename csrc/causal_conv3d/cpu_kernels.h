// Convolution as a matrix product over the taps, compiled once per instruction set by cpu_<isa>.cpp.
//
// A group of output positions meets a block of outputs: its sums stay in registers while the channels of
// some taps pass. Every position has its own pointer to the input of every tap, so that edges, frames of the past,
// strides and the ends of rows cost nothing where the arithmetic is, and no padded copy is ever made.
#pragma once

#include "causal_conv3d/narrow.h"
#include "causal_conv3d/tile.h"

namespace hunyuan_fast::causal_conv3d::HUNYUAN_FAST_ISA {

// Multiplications per sum before it goes back to the cache: weights for so many are kept near meanwhile.
// Sums of so many are added to each other, which loses fewer digits than one long sum.
constexpr int64_t kDepth = 256;

// Vectors per block: as few as hold O, so that few of the products are with zeros.
inline int vectors_for(int64_t O) {
    int vectors = 1;
    while (vectors < kVectors && vectors * kLanes < O) vectors *= 2;
    return vectors;
}

inline Packing packing(int64_t O, int64_t C) {
    if (is_narrow(O, C)) return {1, O};
    int64_t const lanes = vectors_for(O) * kLanes;
    return {lanes, (O + lanes - 1) / lanes};
}

// Where the taps of a weight lie that are added up to one tap of the kernel: [first[tap], first[tap + 1]) of `at`.
struct Sums {
    int64_t at[kMaxTaps];
    int64_t first[kMaxTaps + 1] = {};
};

inline Sums sums_of(Weights const& w) {
    Sums sums;
    int64_t tap = 0, n = 0;
    for (Span const& t : w.t) {
        for (Span const& h : w.h) {
            for (Span const& k : w.w) {
                for (int64_t i = t.begin; i < t.end; ++i) {
                    for (int64_t j = h.begin; j < h.end; ++j) {
                        for (int64_t l = k.begin; l < k.end; ++l) {
                            sums.at[n++] = i * w.stride_t + j * w.stride_h + l * w.stride_w;
                        }
                    }
                }
                sums.first[++tap] = n;
            }
        }
    }
    return sums;
}

// The taps of a weight are adjacent in most layouts, while the packed ones lie far apart: some channels at a time are
// sorted in a buffer, where 27 places are not all in the same set of the cache, and copied out in long runs.
inline void pack(Params const& p, Weights const& w, float* packed, int64_t begin, int64_t end) {
    constexpr int64_t kChannels = 8;
    constexpr int64_t kRun = kChannels * kVectors * kLanes;
    static_assert(kRun % 64 == 0, "the runs below are kept a cache line apart from a power of two");
    float buffer[kMaxTaps][kRun + 16];
    Sums const sums = sums_of(w);
    int64_t const taps = p.kernel.count();
    int64_t const lanes = packing(p.O, p.C).lanes;
    int64_t const of_tap = p.C * lanes;
    for (int64_t block = begin; block < end; ++block) {
        float* const first = packed + block * taps * of_tap;
        for (int64_t c = 0; c < p.C; c += kChannels) {
            int64_t const channels = p.C - c < kChannels ? p.C - c : kChannels;
            for (int64_t i = 0; i < lanes; ++i) {
                int64_t const o = block * lanes + i;
                for (int64_t j = 0; j < channels; ++j) {
                    float const* const from = w.data + o * w.stride_o + (c + j) * w.stride_c;
                    for (int64_t tap = 0; tap < taps; ++tap) {
                        float sum = 0.0f;
                        for (int64_t n = sums.first[tap]; o < p.O && n < sums.first[tap + 1]; ++n) {
                            sum += from[sums.at[n]];
                        }
                        buffer[tap][j * lanes + i] = sum;
                    }
                }
            }
            for (int64_t tap = 0; tap < taps; ++tap) {
                std::memcpy(first + tap * of_tap + c * lanes, buffer[tap], size_t(channels * lanes) * sizeof(float));
            }
        }
    }
}

// Adds the products with the weights of one channel.
template <int kV>
inline void add(float const* const* x, int64_t c, float const* w, Vec (*sums)[kV]) {
    Vec weights[kV];
    for (int v = 0; v < kV; ++v) weights[v] = load_as<Vec>(w + v * kLanes);
    for (int r = 0; r < rows_for(kV); ++r) {
        for (int v = 0; v < kV; ++v) sums[r][v] += x[r][c] * weights[v];
    }
}

// Adds the products of taps [tap, last) for positions [i, i + rows) to their sums.
template <int kV>
inline void group(Tile& tile, int64_t i, int64_t tap, int64_t last, int64_t C, float const* w) {
    constexpr int kRows = rows_for(kV);
    // Two sums of every other channel where one would wait for itself.
    constexpr int kParts = kV == 1 ? 2 : 1;
    Vec sums[kParts][kRows][kV] = {};
    for (; tap < last; ++tap) {
        float const* x[kRows];
        for (int r = 0; r < kRows; ++r) x[r] = tile.inputs[tap][i + r];
        int64_t c = 0;
        for (; c + kParts <= C; c += kParts) {
            for (int part = 0; part < kParts; ++part, w += kV * kLanes) add<kV>(x, c + part, w, sums[part]);
        }
        for (; c < C; ++c, w += kV * kLanes) add<kV>(x, c, w, sums[0]);
    }
    float* const kept = tile.sums + i * kV * kLanes;
    for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kV; ++v) {
            float* const at = kept + (r * kV + v) * kLanes;
            Vec sum = sums[0][r][v];
            for (int part = 1; part < kParts; ++part) sum += sums[part][r][v];
            store_as(at, load_as<Vec>(at) + sum);
        }
    }
}

template <int kV>
inline void start(Params const& p, int64_t o, Tile& tile) {
    float bias[kV * kLanes] = {};
    for (int64_t j = 0; p.bias && j < kV * kLanes && o + j < p.O; ++j) bias[j] = p.bias[o + j];
    for (int64_t i = 0; i < kTile; ++i) std::memcpy(tile.sums + i * kV * kLanes, bias, sizeof bias);
}

template <int kV>
inline void finish(Params const& p, int64_t o, Tile& tile) {
    int64_t const count = p.O - o < kV * kLanes ? p.O - o : kV * kLanes;
    for (int64_t i = 0; i < tile.count; ++i) {
        float const* from = tile.sums + i * kV * kLanes;
        float* to = p.y.data + tile.offset_y[i] + o;
        if (p.residual.data) {
            float const* residual = p.residual.data + tile.offset_residual[i] + o;
            for (int64_t j = 0; j < count; ++j) to[j] = from[j] + residual[j];
        } else {
            std::memcpy(to, from, size_t(count) * sizeof *to);
        }
    }
}

template <int kV>
void run_blocks(Params const& p, Tile& tile) {
    int64_t const taps = p.kernel.count();
    int64_t const at_once = kDepth / p.C > 1 ? kDepth / p.C : 1;
    float const* w = p.weights;
    for (int64_t o = 0; o < p.O; o += kV * kLanes) {
        start<kV>(p, o, tile);
        for (int64_t tap = 0; tap < taps; tap += at_once) {
            int64_t const last = tap + at_once < taps ? tap + at_once : taps;
            for (int64_t i = 0; i < tile.count; i += rows_for(kV)) group<kV>(tile, i, tap, last, p.C, w);
            w += (last - tap) * p.C * kV * kLanes;
        }
        finish<kV>(p, o, tile);
    }
}

inline void run_boxes(Params const& p, int64_t begin, int64_t end, float* room) {
    Tile tile;
    Window window(room);
    for (int64_t each = begin; each < end; ++each) {
        lay_out(p, each, window, tile);
        if (is_narrow(p.O, p.C)) {
            run_narrow(p, tile);
            continue;
        }
        switch (vectors_for(p.O)) {
            case 1: run_blocks<1>(p, tile); break;
            case 2: run_blocks<2>(p, tile); break;
            default: run_blocks<kVectors>(p, tile);
        }
    }
}

constexpr CpuKernels kKernels = {&packing, &pack, &run_boxes};

}  // namespace hunyuan_fast::causal_conv3d::HUNYUAN_FAST_ISA
