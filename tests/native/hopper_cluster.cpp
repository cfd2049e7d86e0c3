// Two blocks of a cluster each fetch half of every tile for both, and store what they have got; with places for faults.
#include "common/sm90_launch.cuh"
#include "common/sm90_tensor_copy.cuh"
#include "common/sm90_tensor_map.cu"

namespace {

using namespace hunyuan_fast;

enum Fault {
    kNone,
    kNoFirstSync,
    kNoLastSync,
    kOneBlockTold,
    kCopiedToOne,
    kLanesLag,
    kOwnHalfAnnounced,
    kNoRelease,
};

constexpr int kRows = 64, kColumns = 64, kBlocks = 2, kThreads = 64;
constexpr uint32_t kTileBytes = kRows * kColumns * 2, kBarriers = kTileBytes, kShared = kBarriers + 16;

struct Places {
    uint32_t tile;
    int rank;
    uint32_t full() const { return tile + kBarriers; }
    uint32_t empty() const { return full() + 8; }
};

void fetch(Places const& at, sm90::TensorMap const& x, int rounds, Fault fault) {
    int const lane = threadIdx.x % 32, half = kRows / kBlocks;
    uint32_t const parts = fault == kOwnHalfAnnounced ? kBlocks : 1;
    for (int round = 0; round < rounds; ++round) {
        sm90::wait(at.empty(), (round & 1) ^ 1);
        if (fault != kLanesLag) __syncwarp();
        if (lane != 0) continue;
        sm90::arrive_expecting(at.full(), kTileBytes / parts);
        sm90::copy_tensor_to_cluster(at.tile + at.rank * half * kColumns * 2, x, 0, at.rank * half, round, 0, at.full(),
                                     fault == kCopiedToOne ? 1 : 3);
    }
}

void store(Places const& at, sm90::TensorMap const& y, int rounds, Fault fault) {
    if (threadIdx.x % 32 != 0) return;
    for (int round = 0; round < rounds; ++round) {
        sm90::wait(at.full(), round & 1);
        sm90::store_tensor(y, at.tile, 0, 0, round, at.rank);
        sm90::commit_stores();
        sm90::wait_for_store_reads<0>();
        if (fault == kNoRelease) continue;
        sm90::arrive_remote(at.empty(), at.rank);
        if (fault != kOneBlockTold) sm90::arrive_remote(at.empty(), at.rank ^ 1);
    }
}

__global__ void kernel(__grid_constant__ sm90::TensorMap const x, __grid_constant__ sm90::TensorMap const y,
                       int rounds, Fault fault) {
    Places const at{sm90::shared_address(sm90::dynamic_shared()), int(blockIdx.x % kBlocks)};
    if (threadIdx.x == 0) {
        sm90::init_barrier(at.full(), 1);
        sm90::init_barrier(at.empty(), fault == kOneBlockTold ? 1 : kBlocks);
        sm90::fence_async_proxy();
    }
    if (fault == kNoFirstSync) {
        __syncthreads();
    } else {
        sm90::sync_cluster();
    }
    if (threadIdx.x < 32) {
        fetch(at, x, rounds, fault);
    } else {
        store(at, y, rounds, fault);
    }
    __syncwarp();
    if (fault != kNoLastSync) sm90::sync_cluster();
}

sm90::TensorMap map_of(void const* data, int rounds, int blocks, int box_rows) {
    sm90::TensorBox box;
    box.data = data, box.swizzled = false;
    int64_t const size[4] = {kColumns, kRows, rounds, blocks};
    int const extent[4] = {kColumns, box_rows, 1, 1};
    for (int i = 0; i < 4; ++i) {
        box.size[i] = size[i], box.box[i] = extent[i];
        box.stride[i] = i == 0 ? 1 : box.stride[i - 1] * size[i - 1];
    }
    return sm90::make_tensor_map(box);
}

}  // namespace

extern "C" {

// x (rounds, 64, 64), bf16, is copied to y (2, rounds, 64, 64).
char const* share(void const* x, void* y, int64_t rounds, int64_t fault) {
    return hopper::attempt([&] {
        auto const from = map_of(x, int(rounds), 1, kRows / kBlocks), to = map_of(y, int(rounds), kBlocks, kRows);
        sm90::launch_clusters(kernel, kBlocks, kBlocks, kThreads, kShared, nullptr, from, to, int(rounds),
                              Fault(fault));
    });
}

}  // extern "C"
