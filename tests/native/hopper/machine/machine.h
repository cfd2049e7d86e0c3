// What a kernel can ask of the emulated Hopper: the headers beside this folder put CUDA's names on it.
//
// Threads of a block are fibers on one thread of the host, blocks run one after the other. What Hopper does
// asynchronously happens here at a time drawn from a seed: at once, as late as the waits allow, or in between.
#pragma once

#include <cstdint>
#include <functional>

namespace hopper {

struct Index {
    unsigned x = 0;
    unsigned y = 0;
    unsigned z = 0;
};

// Of the thread that runs.
extern Index thread_index, block_index, block_size, grid_size;

// Ends the launch; the words reach whoever asked for it.
[[noreturn]] void fail(char const* format, ...) __attribute__((format(printf, 1, 2)));

// ---- warps

void sync_warp(uint32_t lanes);
// The value of another lane: all lanes named in the mask are here.
uint64_t exchange(uint32_t lanes, uint64_t value, int from_lane);
uint32_t ballot(uint32_t lanes, bool value);
bool elect_one();

// ---- barriers

void sync_named(int barrier, int threads);
void arrive_named(int barrier, int threads);
void sync_block();
void sync_cluster();

void init_barrier(uint32_t barrier, int arrivals);
void arrive(uint32_t barrier, uint32_t expected_bytes);
void arrive_remote(uint32_t barrier, int rank);
void wait(uint32_t barrier, uint32_t parity);

// ---- shared memory

char* dynamic_shared();
uint32_t shared_address(void const* pointer);
void fence_async_proxy();
void store_chunk(uint32_t to, uint32_t const* registers);
void store_matrix(uint32_t to, uint32_t const* registers, bool transposed);

// ---- copies

// A tensor and a box of it, as a tensor map holds them.
struct Box {
    uint64_t mark;
    char* data;
    uint64_t strides[4];  // in bytes
    uint32_t sizes[4];    // in elements
    uint16_t box[4];
    uint8_t width;        // of an element, in bytes
    uint8_t swizzled;
};
constexpr uint64_t kMapMark = 0x70614d726f736e65;

void copy_chunk(uint32_t to, void const* from, uint32_t bytes);
void arrive_after_copies(uint32_t barrier);
void copy_bulk(uint32_t to, void const* from, uint32_t bytes, uint32_t barrier);
void prefetch_map(void const* map);
void copy_tensor(uint32_t to, void const* map, int const (&at)[4], uint32_t barrier);
void copy_tensor_to_cluster(uint32_t to, void const* map, int const (&at)[4], uint32_t barrier, uint32_t blocks);
void store_tensor(void const* map, uint32_t from, int const (&at)[4]);
void reduce_add(float* to, uint32_t from, uint32_t bytes);
void commit_stores();
void wait_for_stores(int pending, bool reads_only);
// Fails where the thread has stores that it has not waited for to the end.
void demand_stores(char const* what);

// ---- products

enum class Number { bf16, f16, e4m3 };

// A product as one thread asks for it: descriptors, or registers of A; its part of the sums.
struct ProductCall {
    Number number;
    int columns;
    bool a_along_m;
    bool b_along_n;
    uint64_t a;
    uint64_t b;
    uint32_t const* fragment;  // null: A is in shared memory
    float* sums;
    bool accumulate;
};

void multiply(ProductCall const& call);
void fence_products();
void commit_products();
void wait_for_products(int pending);
void change_registers(int count, bool more);

// ---- launches, by the host

struct Shape {
    Index grid;
    Index block;
    unsigned shared_bytes;
    unsigned cluster;  // blocks, along x
};

void launch(Shape const& shape, std::function<void()> const& kernel);
int processors();
// Null, or what went wrong.
char const* attempt(std::function<void()> const& call);

}  // namespace hopper
