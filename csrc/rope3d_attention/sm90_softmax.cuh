// The softmax of the Hopper kernels: a row at a time as far as it is known, in registers. A thread holds two rows of
// an accumulator, four threads share them.
#pragma once

#include "common/sm90.cuh"

namespace hunyuan_fast::rope3d_attention {

#ifdef HUNYUAN_SM90A

constexpr float kLog2E = 1.4426950408889634f;

__device__ constexpr float infinity() { return __builtin_inff(); }

__device__ inline int row_of_sum(int i) { return i / 2 % 2; }  // which of a thread's rows register i is of

__device__ inline float largest_of_four(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float sum_of_four(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// What has been seen of two rows of scores.
struct Online {
    float largest[2] = {-infinity(), -infinity()};
    float shift[2] = {-infinity(), -infinity()};  // exponent of two that stands for 1: of the largest score, rounded
    float total[2] = {};                          // of exponentials, of this thread's columns

    // Turns scores into exponentials relative to the largest so far. `correction` is what those before are off by.
    // `scale` is that of the scores for powers of two.
    template <int Count>
    __device__ void take(float (&scores)[Count], float scale, float (&correction)[2]) {
        float top[2][2] = {{largest[0], largest[0]}, {largest[1], largest[1]}};  // two of each: shorter chains
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            float& mine = top[row_of_sum(i)][i % 2];
            mine = fmaxf(mine, scores[i]);
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float const before = shift[row];
            largest[row] = largest_of_four(fmaxf(top[row][0], top[row][1]));
            // a row of nothing but -inf stays without a sum
            shift[row] = largest[row] == -infinity() ? 0.0f : largest[row] * scale;
            correction[row] = sm90::exp2_approx(before - shift[row]);
            total[row] *= correction[row];
        }
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            int const row = row_of_sum(i);
            scores[i] = sm90::exp2_approx(fmaf(scores[i], scale, -shift[row]));
            total[row] += scores[i];
        }
    }
};

// Scores of columns from `valid` on count for nothing.
template <int Count>
__device__ void mask_columns(float (&scores)[Count], int thread, int valid) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
        if (sm90::accumulator_column(thread, i) >= valid) scores[i] = -infinity();
    }
}

#endif  // HUNYUAN_SM90A

}  // namespace hunyuan_fast::rope3d_attention
