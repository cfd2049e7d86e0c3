// The CPU kernels of the instruction sets this build has, and who runs them.
#pragma once

#include <cstdint>

#include "common/tensor_view.h"
#include "rope3d_attention/cpu_layout.h"
#include "rope3d_attention/params.h"

namespace hunyuan_fast::rope3d_attention {

// Queries of a head against the keys that they see, `keys_at_once` of them at a time.
struct Block {
    int64_t b = 0;
    int64_t n = 0;
    Places queries;
    Places keys;
    int64_t keys_at_once = 0;
};

// A part of the keys of a head against the queries that see it. The chunks of a head share memory, and so do heads,
// one after the other. A chunk takes a tile of queries once those before it have left that tile: the sums are the
// same on any number of threads.
struct Chunk {
    int64_t b = 0;
    int64_t n = 0;
    Layout const* layout = nullptr;
    Part const* part = nullptr;
    float* shared = nullptr;          // `shared_floats`
    int32_t* left = nullptr;          // of each tile: how many chunks have left it
    int32_t const* before = nullptr;  // the same of the head that had the memory before; null: it is free
};

// Functions are of one dtype. Room is memory for one call, in floats, at a multiple of 64 bytes.
struct CpuKernels {
    // At most so many at once, so that what is at hand stays in the second-level cache.
    Tiles (*forward_tiles)(int64_t D);
    Tiles (*backward_tiles)(int64_t D);
    int64_t (*forward_room)(int64_t D, int64_t queries, int64_t keys);
    int64_t (*backward_room)(int64_t D, int64_t queries, int64_t keys);
    int64_t (*shared_floats)(int64_t D, int64_t tokens);
    void (*forward)(ForwardParams const&, Block const&, float* room);
    void (*backward)(BackwardParams const&, Chunk const&, float* room);
};

// One table per instruction set; the first three exist where HUNYUAN_FAST_X86 is defined, and the first of them,
// which multiplies pairs of bfloat16, for that type alone.
CpuKernels const& avx512_bf16_kernels();
CpuKernels const& avx512_kernels(DType dtype);
CpuKernels const& avx2_kernels(DType dtype);
CpuKernels const& plain_kernels(DType dtype);

// Those of this processor.
CpuKernels const& cpu_kernels(DType dtype);

// Returns when *counter has reached `value`, or more, which another thread sees to.
void wait_for(int32_t const* counter, int32_t value);

void forward_cpu(DType dtype, ForwardParams const& params, int num_threads);
void backward_cpu(DType dtype, BackwardParams const& params, int num_threads);

// Bytes that these have while they run, beside tensors.
int64_t forward_bytes(DType dtype, Inputs const& params, int num_threads);
int64_t backward_bytes(DType dtype, Inputs const& params, int num_threads);

}  // namespace hunyuan_fast::rope3d_attention
