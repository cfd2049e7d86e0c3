// Backward of many heads on many threads, whoever sees whom.
#pragma once

#include <cstdint>
#include <vector>

#include "rope3d_attention/cpu.h"

namespace hunyuan_fast::rope3d_attention {

struct Head {
    int64_t b = 0;
    int64_t n = 0;
    Layout const* layout = nullptr;
    int64_t first_tile = 0;  // of the tiles of all heads
};

// What backward needs for these heads, in their order.
struct BackwardPlan {
    std::vector<Head> heads;
    int64_t chunks = 0;
    int64_t tiles = 0;
    int64_t room = 0;  // floats for each thread
    int64_t threads = 0;
    int64_t lane = 0;  // floats for each lane
    int64_t lanes = 0;

    BackwardPlan(std::vector<Head> given, CpuKernels const& kernel, int64_t D, int num_threads);
    int64_t bytes() const;
};

void run_backward(BackwardParams const& p, BackwardPlan const& plan, CpuKernels const& kernel, int num_threads);

}  // namespace hunyuan_fast::rope3d_attention
