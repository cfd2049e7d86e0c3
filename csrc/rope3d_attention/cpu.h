// The CPU kernels of the instruction sets this build has, and who runs them.
#pragma once

#include <cstdint>

#include "common/tensor_view.h"
#include "rope3d_attention/params.h"

namespace hunyuan_fast::rope3d_attention {

// Rows of all tiles are padded to a multiple of this, so that groups of 6 and of 8 rows come out even.
constexpr int64_t kRows = 24;

// Queries [first, first + count) of a head, `keys_at_once` of its keys at a time.
struct Block {
    int64_t b = 0;
    int64_t n = 0;
    int64_t first = 0;
    int64_t count = 0;
    int64_t keys_at_once = 0;
};

// A chunk, and all before it, have left all tiles there are.
constexpr int32_t kAllTiles = INT32_MAX;

// Keys [first, first + count) of a head against all its queries, `queries_at_once` at a time. The chunks of a head
// share memory, and so do heads, one after the other. A chunk takes a tile of queries once the chunk before it has
// left that tile: the sums are the same on any number of threads.
struct Chunk {
    int64_t b = 0;
    int64_t n = 0;
    int64_t first = 0;
    int64_t count = 0;
    int64_t queries_at_once = 0;
    bool is_first = false;  // of its head
    bool is_last = false;
    float* shared = nullptr;          // `shared_floats` for each tile
    int32_t const* before = nullptr;  // tiles that the chunk before has left; null: there is none
    int32_t* left = nullptr;          // tiles that this one has left
};

struct Tiles {
    int64_t queries;
    int64_t keys;
};

// Functions are of one dtype. Room is memory for one call, in floats, at a multiple of 64 bytes.
struct CpuKernels {
    // At most so many at once, so that what is at hand stays in the second-level cache.
    Tiles (*forward_tiles)(int64_t D);
    Tiles (*backward_tiles)(int64_t D);
    int64_t (*forward_room)(int64_t D, int64_t queries, int64_t keys);
    int64_t (*backward_room)(int64_t D, int64_t queries, int64_t keys);
    int64_t (*shared_floats)(int64_t D, int64_t queries);
    void (*forward)(ForwardParams const&, Block const&, float* room);
    void (*backward)(BackwardParams const&, Chunk const&, float* room);
};

// One table per instruction set; the first three exist where HUNYUAN_FAST_X86 is defined, and the first of them,
// which multiplies pairs of bfloat16, for that type alone.
CpuKernels const& avx512_bf16_kernels();
CpuKernels const& avx512_kernels(DType dtype);
CpuKernels const& avx2_kernels(DType dtype);
CpuKernels const& plain_kernels(DType dtype);

// Returns when *counter has reached `value`, or more, which another thread sees to.
void wait_for(int32_t const* counter, int32_t value);

void forward_cpu(DType dtype, ForwardParams const& params, int num_threads);
void backward_cpu(DType dtype, BackwardParams const& params, int num_threads);

// Bytes that these have while they run, beside tensors.
int64_t forward_bytes(DType dtype, Inputs const& params, int num_threads);
int64_t backward_bytes(DType dtype, Inputs const& params, int num_threads);

}  // namespace hunyuan_fast::rope3d_attention
