// Hopper's instructions one after the other, each against a product made on the host: prints "ok", or which step was
// wrong first. Small integers, so every result is exact. For a machine with an sm_90 GPU:
//   nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Icsrc tests/native/sm90.cu -o sm90 && ./sm90
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/sm90_products.cuh"

namespace sm90 = hunyuan_fast::sm90;

#define REQUIRE(call)                                                                        \
    do {                                                                                     \
        cudaError_t const status = (call);                                                   \
        if (status != cudaSuccess) {                                                         \
            std::printf("line %d, %s: %s\n", __LINE__, #call, cudaGetErrorString(status));   \
            std::exit(1);                                                                    \
        }                                                                                    \
    } while (false)

// How the operands come to shared memory.
enum class Way { stores, copies, bulk };

constexpr char const* kNames[] = {"products of what plain stores wrote", "cp.async with mbarrier arrivals", "cp.async.bulk"};

template <int N>
constexpr int kOperandBytes = (64 + N) * sm90::kRowBytes;

// d (64, N) = a (64, 64) b (N, 64)^T, `rounds` times over in one barrier's phases; a and b as rows of 64 values.
template <class T, int N>
__global__ void __launch_bounds__(sm90::kWarpgroup, 1) product(T const* operands, T const* swizzled, float* d, Way way,
                                                               int rounds) {
#ifdef HUNYUAN_SM90A
    extern __shared__ char allocated[];
    __shared__ uint64_t barrier_memory;
    uint32_t const barrier = sm90::shared_address(&barrier_memory);
    uint32_t const first = sm90::shared_address(allocated);
    uint32_t const skipped = (sm90::kAtomBytes - first % sm90::kAtomBytes) % sm90::kAtomBytes, base = first + skipped;
    int const thread = threadIdx.x;
    if (thread == 0) {
        sm90::init_barrier(barrier, way == Way::copies ? sm90::kWarpgroup : 1);
        sm90::fence_async_proxy();
    }
    __syncthreads();
    float sums[N / 2];
    for (int round = 0; round < rounds; ++round) {
        if (way == Way::bulk && thread == 0) {
            sm90::arrive_expecting(barrier, kOperandBytes<N>);
            sm90::copy_bulk(base, swizzled, kOperandBytes<N>, barrier);
        }
        for (int chunk = thread; way != Way::bulk && chunk < (64 + N) * 8; chunk += sm90::kWarpgroup) {
            uint32_t const to = sm90::chunk_offset(chunk / 8, chunk % 8);
            auto const* const from = reinterpret_cast<uint4 const*>(operands) + chunk;
            if (way == Way::copies) sm90::copy_chunk(base + to, from);
            else *reinterpret_cast<uint4*>(allocated + skipped + to) = *from;
        }
        if (way == Way::copies) sm90::arrive_after_copies(barrier);
        if (way == Way::stores) {
            sm90::fence_async_proxy();
            __syncthreads();
        } else {
            sm90::wait(barrier, round & 1);
            sm90::fence_async_proxy();
            __syncwarp();
        }
        uint64_t const a = sm90::descriptor(base), b = sm90::descriptor(base + 64 * sm90::kRowBytes);
        sm90::fence_products();
        for (int k = 0; k < 4; ++k) {
            sm90::multiply<T, N>(sums, a + sm90::descriptor_step(k), b + sm90::descriptor_step(k), round | k);
        }
        sm90::commit_products();
        sm90::wait_for_products<0>();
        sm90::settle(sums);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        d[sm90::accumulator_row(thread, i) * N + sm90::accumulator_column(thread, i)] = sums[i];
    }
#else
    __trap();
#endif
}

template <class T, int N>
bool right(Way way, int rounds) {
    std::vector<T> operands((64 + N) * 64), swizzled(operands.size());
    std::vector<int> values(operands.size());
    for (size_t i = 0; i < operands.size(); ++i) {
        values[i] = std::rand() % 7 - 3;
        operands[i] = T(float(values[i]));
        int const row = int(i) / 64, column = int(i) % 64;
        swizzled[sm90::chunk_offset(row, column / 8) / sizeof(T) + column % 8] = operands[i];
    }
    T *on_device, *swizzled_on_device;
    float* d;
    std::vector<float> found(64 * N);
    size_t const bytes = operands.size() * sizeof(T), shared = kOperandBytes<N> + sm90::kAtomBytes;
    REQUIRE(cudaMalloc(&on_device, bytes));
    REQUIRE(cudaMalloc(&swizzled_on_device, bytes));
    REQUIRE(cudaMalloc(&d, found.size() * sizeof(float)));
    REQUIRE(cudaMemcpy(on_device, operands.data(), bytes, cudaMemcpyHostToDevice));
    REQUIRE(cudaMemcpy(swizzled_on_device, swizzled.data(), bytes, cudaMemcpyHostToDevice));
    auto const kernel = product<T, N>;
    REQUIRE(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    kernel<<<1, sm90::kWarpgroup, shared>>>(on_device, swizzled_on_device, d, way, rounds);
    REQUIRE(cudaGetLastError());
    REQUIRE(cudaMemcpy(found.data(), d, found.size() * sizeof(float), cudaMemcpyDeviceToHost));
    REQUIRE(cudaFree(on_device));
    REQUIRE(cudaFree(swizzled_on_device));
    REQUIRE(cudaFree(d));
    for (int m = 0; m < 64; ++m)
        for (int n = 0; n < N; ++n) {
            int sum = 0;
            for (int k = 0; k < 64; ++k) sum += values[m * 64 + k] * values[(64 + n) * 64 + k];
            if (found[m * N + n] == float(sum * rounds)) continue;
            std::printf("%s, N = %d, %d rounds: (%d, %d) is %g, not %d\n", kNames[int(way)], N, rounds, m, n,
                        found[m * N + n], sum * rounds);
            return false;
        }
    return true;
}

template <class T>
bool all_right() {
    for (Way way : {Way::stores, Way::copies, Way::bulk})
        for (int rounds : {1, 2, 5}) {
            if (!right<T, 128>(way, rounds) || !right<T, 256>(way, rounds)) return false;
        }
    return true;
}

int main() {
    if (!all_right<__nv_bfloat16>() || !all_right<__half>()) return 1;
    std::printf("ok\n");
    return 0;
}
