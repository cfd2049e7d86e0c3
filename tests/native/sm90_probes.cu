// Runs sm90_probes.cuh against what a host makes of it: prints "ok", or what was wrong first. Small integers, so every
// result is exact. For a machine with an sm_90 GPU:
//   nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Icsrc tests/native/sm90_probes.cu \
//     csrc/common/sm90_tensor_map.cu -o sm90_probes && ./sm90_probes
#include "sm90_probes.cuh"

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace hunyuan_fast;

namespace {

template <class V>
struct OnDevice {
    V* data = nullptr;
    size_t count;

    explicit OnDevice(std::vector<V> const& values) : count(values.size()) {
        HUNYUAN_CUDA_CHECK(cudaMalloc(&data, count * sizeof(V)));
        HUNYUAN_CUDA_CHECK(cudaMemcpy(data, values.data(), count * sizeof(V), cudaMemcpyHostToDevice));
    }
    OnDevice(OnDevice const&) = delete;
    ~OnDevice() { cudaFree(data); }

    std::vector<V> read() const {
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

template <class T, class From>
std::vector<T> mapped(std::vector<int> const& values, From const& from) {
    std::vector<T> result;
    for (int value : values) result.push_back(from(value));
    return result;
}

float same(int value) { return float(value); }

// e4m3 of -3 to 3: a sign, four bits of exponent about 7, three of mantissa.
uint8_t coded(int value) {
    constexpr uint8_t kSizes[] = {0x00, 0x38, 0x40, 0x44};
    return uint8_t((value < 0 ? 0x80 : 0) | kSizes[std::abs(value)]);
}

bool right_share() {
    constexpr int kRows = 40, kHeads = 3, kRounds = 4 * kHeads;  // the last tile of rows lies past the tensor
    std::vector<uint16_t> rows(kRows * kHeads * 64);
    for (uint16_t& value : rows) value = uint16_t(std::rand() % 65535 + 1);
    size_t const chunks = size_t(2) * kRounds * probes::kSharedTile / 16;
    OnDevice<uint16_t> const from(rows), to(std::vector<uint16_t>(chunks * 8, 0xdead));
    probes::share(from.data, reinterpret_cast<uint4*>(to.data), kRows, kHeads, kRounds, nullptr);
    auto const found = to.read();
    for (int block = 0; block < 2; ++block)
        for (int round = 0; round < kRounds; ++round)
            for (int i = 0; i < probes::kSharedRows * 64; ++i) {
                int const in_tile = i / 64, column = i % 64, row = round / kHeads * probes::kSharedRows + in_tile;
                size_t const tile = size_t(block * kRounds + round) * probes::kSharedTile / 2;
                int const got = found[tile + sm90::chunk_offset(in_tile, column / 8) / 2 + column % 8];
                int const expected = row < kRows ? rows[(row * kHeads + round % kHeads) * 64 + column] : 0;
                if (got == expected) continue;
                std::printf("shared tiles: block %d, round %d: (%d, %d) is %x, not %x\n", block, round, in_tile, column,
                            got, expected);
                return false;
            }
    return true;
}

// d = a b^T, of which rows and columns from `valid` on are zeros.
bool right_product(char const* what, std::vector<float> const& d, std::vector<int> const& a, std::vector<int> const& b,
                   int columns, int depth, int valid) {
    for (int m = 0; m < 64; ++m)
        for (int n = 0; n < columns; ++n) {
            int sum = 0;
            for (int k = 0; k < depth && m < valid && n < valid; ++k) sum += a[m * depth + k] * b[n * depth + k];
            if (d[m * columns + n] == float(sum)) continue;
            std::printf("%s: (%d, %d) is %g, not %d\n", what, m, n, d[m * columns + n], sum);
            return false;
        }
    return true;
}

bool right_bytes(bool registers) {
    auto const a = draw(64 * probes::kByteDepth), b = draw(probes::kByteColumns * probes::kByteDepth);
    OnDevice<uint8_t> const left(mapped<uint8_t>(a, coded)), right(mapped<uint8_t>(b, coded));
    OnDevice<float> const values(mapped<float>(a, same)), d(std::vector<float>(64 * probes::kByteColumns, -1.0f));
    probes::multiply_bytes(left.data, right.data, registers ? values.data : nullptr, d.data, nullptr);
    return right_product(registers ? "bytes from registers" : "bytes from shared memory", d.read(), a, b,
                         probes::kByteColumns, probes::kByteDepth, probes::kByteColumns);
}

template <class T>
bool right_tails(int valid) {
    auto const a = draw(64 * 64), b = draw(64 * 64);
    auto const rounded = [](int value) { return T(float(value)); };
    OnDevice<T> const left(mapped<T>(a, rounded)), right(mapped<T>(b, rounded));
    OnDevice<float> const d(std::vector<float>(64 * 64, -1.0f));
    probes::multiply_tails(left.data, right.data, d.data, valid, nullptr);
    return right_product("tails", d.read(), a, b, 64, 64, valid);
}

bool right_turns() {
    constexpr int kBlocks = 5000;  // more than run at a time
    constexpr int kCount = probes::kTurnPlaces * probes::kTurnNumbers;
    OnDevice<float> const sums(std::vector<float>(kCount, 0.0f));
    OnDevice<int> const counters(std::vector<int>(1 + probes::kTurnPlaces, 0));
    probes::add_in_turns(sums.data, counters.data, kBlocks, nullptr);
    auto const found = sums.read();
    for (int at = 0; at < kCount; ++at) {
        float sum = 0;
        for (int block = 0; block < kBlocks; ++block) {
            sum += probes::share_of(block, at / probes::kTurnNumbers, at % probes::kTurnNumbers);
        }
        if (found[at] == sum) continue;
        std::printf("turns: number %d is %g, not %g\n", at, found[at], sum);
        return false;
    }
    return true;
}

}  // namespace

int main() {
    for (int valid : {1, 37, 64}) {
        if (!right_tails<__nv_bfloat16>(valid) || !right_tails<__half>(valid)) return 1;
    }
    if (!right_bytes(false) || !right_bytes(true) || !right_share() || !right_turns()) return 1;
    std::printf("ok\n");
    return 0;
}
