// A small matrix product that uses every instruction of the emulated machine once, with places for faults.
#include <utility>

#include "common/sm90_launch.cuh"
#include "common/sm90_products.cuh"
#include "common/sm90_tensor_copy.cuh"
#include "common/sm90_tensor_map.cu"

namespace {

using namespace hunyuan_fast;
using sm90::Major;

// What is wrong on purpose.
enum Fault {
    kNone,
    kNoWaitForSums,
    kWrongParity,
    kNoWaitForEmpty,
    kWrongStride,
    kFewBytes,
    kManyBytes,
    kNoProxyFence,
    kEarlyRelease,
    kNoProductFence,
    kFragmentsOverwritten,
    kWrongLeadingDimension,
    kNoWaitForStore,
    kBarriersUnfenced,
    kNamedBarrierTooLarge,
    kTooManyRegisters,
    kBeyondTensor,
    kSumsTouched,
    kStageTooHigh,
    kMisalignedTile,
    kLaneMissing,
    kPlainStoreUnfenced,
    kReadBeforeFull,
};

// How A reaches the products, and how B lies.
enum Form { kAlongK, kBAlongN, kAAlongM, kFromRegisters, kBytes };

constexpr int kRows = 64, kColumns = 128, kStages = 2;
constexpr uint32_t kTileA = kRows * 128, kTileB = kColumns * 128, kStageBytes = kTileA + kTileB;
constexpr uint32_t kOut = kStages * kStageBytes, kOutBytes = kRows * kColumns * 4, kBarriers = kOut + kOutBytes;
constexpr uint32_t kShared = kBarriers + 16 * kStages;
constexpr int kThreads = 256;

struct Arguments {
    int K;          // of A and B; rows and columns are those of one tile
    Form form;
    Fault fault;
    float* sums;    // null: bf16 to the map, else fp32 is added there
    float const* scale;  // of a row, or null
};

struct Places {
    uint32_t base;
    uint32_t a(int stage) const { return base + stage * kStageBytes; }
    uint32_t b(int stage) const { return a(stage) + kTileA; }
    uint32_t full(int stage) const { return base + kBarriers + stage * 16; }
    uint32_t empty(int stage) const { return full(stage) + 8; }
};

// Values of K in a row of 128 bytes.
int depth_of(Form form) { return form == kBytes ? 128 : 64; }

void produce(Arguments const& p, Places const& at, sm90::TensorMap const& a, sm90::TensorMap const& b) {
    sm90::Ring<kStages> ring;
    if (threadIdx.x != 0) return;
    int const step = depth_of(p.form), first_row = int(blockIdx.x) * kRows, first_column = int(blockIdx.y) * kColumns;
    for (int k = 0; k < p.K; k += step, ring.advance()) {
        if (p.fault != kNoWaitForEmpty) sm90::wait(at.empty(ring.stage), ring.phase ^ 1);
        uint32_t const full = at.full(ring.stage);
        uint32_t const announced = kStageBytes + (p.fault == kManyBytes ? 16 : p.fault == kFewBytes ? -16 : 0);
        sm90::arrive_expecting(full, announced);
        uint32_t const to_a = at.a(ring.stage) + (p.fault == kMisalignedTile ? 128 : 0);
        if (p.form == kAAlongM) {
            sm90::copy_tensor(to_a, a, first_row, k, 0, 0, full);
        } else {
            sm90::copy_tensor(to_a, a, k, first_row, 0, 0, full);
        }
        if (p.form == kBAlongN) {  // two blocks of 64 columns
            sm90::copy_tensor(at.b(ring.stage), b, first_column, k, 0, 0, full);
            sm90::copy_tensor(at.b(ring.stage) + kTileB / 2, b, first_column + 64, k, 0, 0, full);
        } else {
            sm90::copy_tensor(at.b(ring.stage), b, k, first_column, 0, 0, full);
        }
    }
}

// One stage of a product from registers: A is read by plain loads.
void load_fragments(uint32_t (&fragments)[4][4], char const* tile) {
    int const thread = threadIdx.x % 128;
    for (int k = 0; k < 4; ++k)
        for (int i = 0; i < 4; ++i) {
            int const row = sm90::fragment_row(thread, i), column = 16 * k + sm90::fragment_column(thread, i);
            auto const from = sm90::chunk_offset(row, column / 8) + column % 8 * 2;
            fragments[k][i] = *reinterpret_cast<uint32_t const*>(tile + from);
        }
}

void multiply_stage(Arguments const& p, Places const& at, int stage, float (&sums)[kColumns / 2],
                    uint32_t (&fragments)[4][4], bool first) {
    using T = __nv_bfloat16;
    uint64_t const wrong = p.fault == kWrongStride ? uint64_t(1024 >> 4) << 32 : 0;
    uint32_t const leading = p.fault == kWrongLeadingDimension ? 1024 : kTileB / 2;
    uint64_t const a = sm90::descriptor(at.a(stage)) + wrong, b = sm90::descriptor(at.b(stage));
    uint64_t const a_mn = sm90::descriptor_mn(at.a(stage), kTileA), b_mn = sm90::descriptor_mn(at.b(stage), leading);
    for (int k = 0; k < 4; ++k) {
        uint64_t const more = sm90::descriptor_step(k), more_mn = sm90::descriptor_step_mn(k);
        int const accumulate = !first || k > 0;
        switch (p.form) {
            case kAlongK: sm90::multiply<T, kColumns>(sums, a + more, b + more, accumulate); break;
            case kBAlongN:
                sm90::multiply<T, kColumns, Major::MN>(sums, a + more, b_mn + more_mn, accumulate);
                break;
            case kAAlongM:
                sm90::multiply<T, kColumns, Major::K, Major::MN>(sums, a_mn + more_mn, b + more, accumulate);
                break;
            case kFromRegisters: sm90::multiply<T, kColumns>(sums, fragments[k], b + more, accumulate); break;
            case kBytes: sm90::multiply_e4m3<kColumns>(sums, a + more, b + more, accumulate); break;
        }
    }
}

void consume(Arguments const& p, Places const& at, char const* shared, float (&sums)[kColumns / 2]) {
    sm90::Ring<kStages> ring;
    uint32_t fragments[4][4];
    bool const leader = threadIdx.x % 32 == 0;
    for (int k = 0; k < p.K; k += depth_of(p.form), ring.advance()) {
        if (p.fault != kReadBeforeFull) {
            sm90::wait(at.full(ring.stage), ring.phase ^ (p.fault == kWrongParity ? 1 : 0));
        }
        if (p.form == kFromRegisters) load_fragments(fragments, shared + ring.stage * kStageBytes);
        if (p.fault != kNoProductFence) sm90::fence_products();
        multiply_stage(p, at, ring.stage, sums, fragments, k == 0);
        sm90::commit_products();
        if (p.fault == kFragmentsOverwritten) fragments[3][3] ^= 1;
        if (p.fault == kSumsTouched) sums[3] += 1.0f;
        if (p.fault == kEarlyRelease && leader) sm90::arrive(at.empty(ring.stage));
        if (p.fault != kNoWaitForSums) sm90::wait_for_products<0>();
        if (p.fault != kEarlyRelease && leader) sm90::arrive(at.empty(ring.stage));
    }
    sm90::settle(sums);
}

// bf16 by stmatrix and a tensor store: two boxes of 64 columns.
void send_rounded(Arguments const& p, uint32_t out, sm90::TensorMap const& y, float const (&sums)[kColumns / 2]) {
    int const thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    int const row = warp * 16 + lane % 16, half = lane / 16;
    for (int i = 0; i < kColumns / 2; i += 8) {  // 16 columns
        uint32_t packed[4];
        for (int j = 0; j < 4; ++j) packed[j] = sm90::pack<__nv_bfloat16>(sums[i + 2 * j], sums[i + 2 * j + 1]);
        int const chunk = i / 4 + half;
        sm90::store_matrix(out + chunk / 8 * kRows * 128 + sm90::chunk_offset(row, chunk % 8), packed);
    }
    if (p.fault != kNoProxyFence) sm90::fence_async_proxy();
    sm90::sync_named(1, p.fault == kNamedBarrierTooLarge ? 160 : 128);
    if (warp == 0 && sm90::elect_one()) {
        int const first_row = int(blockIdx.x) * kRows, first_column = int(blockIdx.y) * kColumns;
        sm90::store_tensor(y, out, first_column, first_row, 0, 0);
        sm90::store_tensor(y, out + kRows * 128, first_column + 64, first_row, 0, 0);
        sm90::commit_stores();
        if (p.fault != kNoWaitForStore) sm90::wait_for_store_reads<0>();
    }
}

// fp32 by plain stores and a bulk sum, tile after tile.
void send_sums(Arguments const& p, uint32_t out, char* shared, float const (&sums)[kColumns / 2]) {
    int const thread = threadIdx.x % 128;
    for (int i = 0; i < kColumns / 2; ++i) {
        int const row = sm90::accumulator_row(thread, i), column = sm90::accumulator_column(thread, i);
        float const scale = p.scale == nullptr ? 1.0f : p.scale[row + (p.fault == kBeyondTensor ? 64 : 0)];
        reinterpret_cast<float*>(shared + kOut)[row * kColumns + column] = scale * sums[i];
    }
    if (p.fault != kPlainStoreUnfenced) sm90::fence_async_proxy();
    sm90::sync_named(1, 128);
    if (thread == 0) {
        int64_t const tile = int64_t(blockIdx.x) * gridDim.y + blockIdx.y;
        sm90::reduce_add(p.sums + tile * kRows * kColumns, out, kOutBytes);
        sm90::commit_stores();
        sm90::wait_for_stores<0>();
    }
}

__global__ void __launch_bounds__(kThreads, 1)
    kernel(Arguments p, __grid_constant__ sm90::TensorMap const a, __grid_constant__ sm90::TensorMap const b,
           __grid_constant__ sm90::TensorMap const y) {
    char* const shared = sm90::dynamic_shared();
    Places const at{sm90::shared_address(shared) + (p.fault == kStageTooHigh ? 65536 : 0)};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            sm90::init_barrier(at.full(stage), 1);
            sm90::init_barrier(at.empty(stage), 4);
        }
        if (p.fault != kBarriersUnfenced) sm90::fence_async_proxy();
    }
    __syncthreads();
    if (threadIdx.x / 128 == 0) {
        sm90::give_registers<56>();
        return produce(p, at, a, b);
    }
    if (p.fault == kTooManyRegisters) return sm90::take_registers<256>();
    float sums[kColumns / 2];
    consume(p, at, shared, sums);
    if (p.fault == kLaneMissing && threadIdx.x % 32 == 7) return;
    if (p.sums == nullptr) {
        send_rounded(p, at.base + kOut, y, sums);
    } else {
        send_sums(p, at.base + kOut, shared, sums);
    }
}

sm90::TensorMap map_of(void const* data, sm90::Element element, int64_t width, int64_t rows, int box_rows) {
    sm90::TensorBox box;
    int const inner = 128 / sm90::bytes_of(element);
    box.data = data, box.element = element, box.box[0] = inner, box.box[1] = box_rows, box.box[2] = box.box[3] = 1;
    box.size[0] = width, box.size[1] = rows, box.size[2] = box.size[3] = 1;
    box.stride[0] = 1, box.stride[1] = width, box.stride[2] = box.stride[3] = width * rows;
    return sm90::make_tensor_map(box);
}

}  // namespace

extern "C" {

// y (M, N) bf16, or sums (tiles, 64, 128) to which products are added. A is (M, K), or (K, M) along M; B is (N, K), or
// (K, N) along N.
char const* gemm(void const* a, void const* b, void* y, float* sums, float const* scale, int64_t M, int64_t N,
                 int64_t K, int64_t form, int64_t fault) {
    return hopper::attempt([&] {
        auto const element = form == kBytes ? sm90::Element::e4m3 : sm90::Element::bf16;
        auto const map_a = form == kAAlongM ? map_of(a, element, M, K, 64) : map_of(a, element, K, M, kRows);
        auto const map_b = form == kBAlongN ? map_of(b, element, N, K, 64) : map_of(b, element, K, N, kColumns);
        auto const map_y = y == nullptr ? sm90::TensorMap{} : map_of(y, sm90::Element::bf16, N, M, kRows);
        dim3 const grid(unsigned(M + kRows - 1) / kRows, unsigned(N + kColumns - 1) / kColumns);
        Arguments const p = {int(K), Form(form), Fault(fault), sums, scale};
        sm90::launch(kernel, grid, kThreads, kShared, nullptr, p, map_a, map_b, map_y);
    });
}

}  // extern "C"
