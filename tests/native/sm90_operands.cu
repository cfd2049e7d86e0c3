// Where Hopper's products and copies of tensors find and leave their numbers, against products made on the host: prints
// "ok", or what was wrong first. Small integers, so every result is exact. For a machine with an sm_90 GPU:
//   nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Icsrc tests/native/sm90_operands.cu \
//     csrc/common/sm90_tensor_map.cu -o sm90_operands && ./sm90_operands
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/sm90_launch.cuh"
#include "common/sm90_products.cuh"
#include "common/sm90_tensor_copy.cuh"

namespace sm90 = hunyuan_fast::sm90;
using sm90::Major;

constexpr int kDepth = 64;  // of the products here
constexpr uint32_t kBlockBytes = 64 * sm90::kRowBytes;

template <class V>
struct OnDevice {
    V* data = nullptr;

    explicit OnDevice(std::vector<V> const& values) {
        HUNYUAN_CUDA_CHECK(cudaMalloc(&data, values.size() * sizeof(V)));
        HUNYUAN_CUDA_CHECK(cudaMemcpy(data, values.data(), values.size() * sizeof(V), cudaMemcpyHostToDevice));
    }
    OnDevice(OnDevice const&) = delete;
    ~OnDevice() { cudaFree(data); }

    std::vector<V> read(size_t count) const {
        std::vector<V> values(count);
        HUNYUAN_CUDA_CHECK(cudaMemcpy(values.data(), data, count * sizeof(V), cudaMemcpyDeviceToHost));
        return values;
    }
};

std::vector<int> draw(size_t count) {
    std::vector<int> values(count);
    for (int& value : values) value = std::rand() % 7 - 3;
    return values;
}

template <class T>
std::vector<T> rounded(std::vector<int> const& values) {
    std::vector<T> result;
    for (int value : values) result.push_back(T(float(value)));
    return result;
}

#ifdef HUNYUAN_SM90A

__device__ uint32_t aligned_shared() {
    uint32_t const start = sm90::shared_address(sm90::dynamic_shared());
    return (start + sm90::kAtomBytes - 1) / sm90::kAtomBytes * sm90::kAtomBytes;
}

__device__ uint64_t described(uint32_t at, Major major) {
    return major == Major::K ? sm90::descriptor(at) : sm90::descriptor_mn(at, kBlockBytes);
}

__device__ uint64_t stepped(int k, Major major) {
    return major == Major::K ? sm90::descriptor_step(k) : sm90::descriptor_step_mn(k);
}

#endif

// ---- products: a (64 x 64) and b (N x 64), either of them given as its transpose where it is MN-major

constexpr int kBarrierAt = (4 + 1) * kBlockBytes;
constexpr uint32_t kProductShared = kBarrierAt + 16 + sm90::kAtomBytes;

struct Operands {
    sm90::TensorMap a;
    sm90::TensorMap b;
};

template <class T, int N, Major A, Major B, bool Registers>
__global__ void __launch_bounds__(sm90::kWarpgroup, 1)
    product(__grid_constant__ Operands const operands, T const* a, float* d) {
#ifdef HUNYUAN_SM90A
    uint32_t const base = aligned_shared(), at_b = base + kBlockBytes, barrier = base + kBarrierAt;
    int const thread = threadIdx.x;
    if (thread == 0) {
        constexpr int kBoxes = B == Major::K ? 1 : (N + 63) / 64, kRows = B == Major::K ? N : kDepth;
        sm90::init_barrier(barrier, 1);
        sm90::fence_async_proxy();
        sm90::prefetch_map(operands.a);
        sm90::arrive_expecting(barrier, kBlockBytes + kBoxes * kRows * sm90::kRowBytes);
        sm90::copy_tensor(base, operands.a, 0, 0, 0, 0, barrier);
        for (int i = 0; i < kBoxes; ++i) {
            sm90::copy_tensor(at_b + i * kBlockBytes, operands.b, 64 * i, 0, 0, 0, barrier);
        }
    }
    __syncthreads();
    sm90::wait(barrier, 0);
    float sums[N / 2];
    sm90::fence_products();
    for (int k = 0; k < kDepth / sm90::kDepth; ++k) {
        uint64_t const right = described(at_b, B) + stepped(k, B);
        if constexpr (Registers) {
            uint32_t pairs[4];
            for (int i = 0; i < 4; ++i) {
                int const row = sm90::fragment_row(thread, i), column = 16 * k + sm90::fragment_column(thread, i);
                T const* const pair = a + row * kDepth + column;
                pairs[i] = sm90::pack<T>(float(pair[0]), float(pair[1]));
            }
            sm90::fence_products();
            sm90::multiply<T, N, B>(sums, pairs, right, k);
            sm90::commit_products();
            sm90::wait_for_products<0>();  // before the registers change
        } else {
            sm90::multiply<T, N, B, A>(sums, described(base, A) + stepped(k, A), right, k);
        }
    }
    sm90::commit_products();
    sm90::wait_for_products<0>();
    sm90::settle(sums);
    for (int i = 0; i < N / 2; ++i) {
        d[sm90::accumulator_row(thread, i) * N + sm90::accumulator_column(thread, i)] = sums[i];
    }
#else
    __trap();
#endif
}

// A map of rows of `columns` values, in boxes of 64 columns.
template <class T>
sm90::TensorMap map_of(T const* data, int rows, int columns) {
    sm90::TensorBox box;
    int const size[4] = {columns, rows, 1, 1}, stride[4] = {1, columns, 8, 8}, extent[4] = {64, rows, 1, 1};
    for (int i = 0; i < 4; ++i) box.size[i] = size[i], box.stride[i] = stride[i], box.box[i] = extent[i];
    box.data = data;
    box.element = std::is_same_v<T, __half> ? sm90::Element::f16 : sm90::Element::bf16;
    return sm90::make_tensor_map(box);
}

std::vector<int> transposed(std::vector<int> const& values, int rows) {
    int const columns = int(values.size()) / rows;
    std::vector<int> result(values.size());
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) result[j * rows + i] = values[i * columns + j];
    return result;
}

template <class T, int N, Major A, Major B, bool Registers>
bool right_product() {
    auto const a = draw(64 * kDepth), b = draw(N * kDepth);
    OnDevice<T> const left(rounded<T>(A == Major::K ? a : transposed(a, 64)));
    OnDevice<T> const right(rounded<T>(B == Major::K ? b : transposed(b, N)));
    OnDevice<float> const d(std::vector<float>(64 * N));
    Operands const operands{map_of(left.data, 64, 64),
                            B == Major::K ? map_of(right.data, N, kDepth) : map_of(right.data, kDepth, N)};
    sm90::launch(product<T, N, A, B, Registers>, 1, sm90::kWarpgroup, kProductShared, nullptr, operands, left.data,
                 d.data);
    auto const found = d.read(64 * N);
    for (int m = 0; m < 64; ++m)
        for (int n = 0; n < N; ++n) {
            int sum = 0;
            for (int k = 0; k < kDepth; ++k) sum += a[m * kDepth + k] * b[n * kDepth + k];
            if (found[m * N + n] == float(sum)) continue;
            std::printf("product, N = %d, a %s, b %s, from %s: (%d, %d) is %g, not %d\n", N,
                        A == Major::K ? "K-major" : "MN-major", B == Major::K ? "K-major" : "MN-major",
                        Registers ? "registers" : "shared memory", m, n, found[m * N + n], sum);
            return false;
        }
    return true;
}

template <class T, int N>
bool right_products() {
    return right_product<T, N, Major::K, Major::K, false>() && right_product<T, N, Major::K, Major::MN, false>() &&
           right_product<T, N, Major::MN, Major::K, false>() && right_product<T, N, Major::MN, Major::MN, false>() &&
           right_product<T, N, Major::K, Major::K, true>() && right_product<T, N, Major::K, Major::MN, true>();
}

// ---- what leaves shared memory

constexpr uint32_t kStoreShared = 16 * sm90::kRowBytes + sm90::kAtomBytes;

// Rows 5 to 12 of `out`, (16, 64), by stmatrix and a tensor store: 64 row + column, or its transpose within blocks of
// 8. `total` gets 64 numbers added, twice.
__global__ void leave(__grid_constant__ sm90::TensorMap const map, float* total, bool transposed) {
#ifdef HUNYUAN_SM90A
    uint32_t const base = aligned_shared();
    auto* const shared = sm90::dynamic_shared() + (base - sm90::shared_address(sm90::dynamic_shared()));
    int const lane = threadIdx.x;
    for (int half = 0; half < 2; ++half) {
        uint32_t pairs[4];
        for (int i = 0; i < 4; ++i) {
            float const at = float(64 * (lane / 4) + 8 * (4 * half + i) + lane % 4 * 2);
            pairs[i] = sm90::pack<__half>(at, at + 1);
        }
        uint32_t const to = base + sm90::chunk_offset(lane % 8, 4 * half + lane / 8);
        transposed ? sm90::store_matrix_transposed(to, pairs) : sm90::store_matrix(to, pairs);
    }
    auto* const added = reinterpret_cast<float*>(shared + 8 * sm90::kRowBytes);
    for (int i = lane; i < 64; i += 32) added[i] = float(i);
    sm90::fence_async_proxy();
    __syncwarp();
    if (sm90::elect_one()) {
        sm90::store_tensor(map, base, 0, 5, 0, 0);
        sm90::reduce_add(total, base + 8 * sm90::kRowBytes, 64 * 4);
        sm90::commit_stores();
        sm90::reduce_add(total, base + 8 * sm90::kRowBytes, 64 * 4);
        sm90::commit_stores();
        sm90::wait_for_store_reads<1>();
        sm90::wait_for_stores<0>();
    }
    __syncwarp();
#else
    __trap();
#endif
}

bool right_stores(bool transposed) {
    OnDevice<__half> const out(std::vector<__half>(16 * 64, __half(-1.0f)));
    OnDevice<float> const total(std::vector<float>(64, 0.5f));
    sm90::TensorBox box;
    int const size[4] = {64, 16, 1, 1}, stride[4] = {1, 64, 8, 8}, extent[4] = {64, 8, 1, 1};
    for (int i = 0; i < 4; ++i) box.size[i] = size[i], box.stride[i] = stride[i], box.box[i] = extent[i];
    box.data = out.data, box.element = sm90::Element::f16;
    sm90::launch(leave, 1, 32, kStoreShared, nullptr, sm90::make_tensor_map(box), total.data, transposed);
    auto const stored = out.read(16 * 64);
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 64; ++column) {
            int const r = row - 5, c = column % 8, block = column - c;
            float const expected = r < 0 || r > 7 ? -1.0f : float(transposed ? 64 * c + block + r : 64 * r + column);
            if (float(stored[row * 64 + column]) == expected) continue;
            std::printf("stored%s: (%d, %d) is %g, not %g\n", transposed ? ", transposed" : "", row, column,
                        float(stored[row * 64 + column]), expected);
            return false;
        }
    auto const sums = total.read(64);
    for (int i = 0; i < 64; ++i) {
        if (sums[i] == 0.5f + 2 * i) continue;
        std::printf("added: number %d is %g\n", i, sums[i]);
        return false;
    }
    return true;
}

template <class T>
bool all_right() {
    return right_products<T, 64>() && right_products<T, 80>() && right_products<T, 96>() && right_products<T, 128>() &&
           right_products<T, 176>() && right_products<T, 192>() && right_products<T, 256>();
}

int main() {
    if (!all_right<__nv_bfloat16>() || !all_right<__half>() || !right_stores(false) || !right_stores(true)) return 1;
    std::printf("ok\n");
    return 0;
}
