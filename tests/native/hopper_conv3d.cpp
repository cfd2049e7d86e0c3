// The Hopper convolution without a Hopper: what its thread blocks do, one after the other on the host, with the index
// functions of the kernel itself and the machine's part of them written down a second time, from the PTX ISA. bf16.
//
// Sums are made in fp32 in another order than on the GPU. Each function returns null, or what went wrong.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "causal_conv3d/sm90_layout.h"

namespace {

using namespace hunyuan_fast;
using namespace hunyuan_fast::causal_conv3d;

constexpr uint32_t kBase = 1024;  // where shared memory begins
constexpr uint8_t kUnwritten = 0xff;  // two of them are a NaN

std::string fault;

char const* report(std::string const& words) {
    fault = words;
    return fault.c_str();
}

float widened(uint16_t bits) {
    uint32_t const wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// Throws unless [at, at + count) lies within [0, size).
int64_t within(int64_t at, int64_t count, int64_t size, char const* of) {
    if (at < 0 || at + count > size) throw std::out_of_range(of);
    return at;
}

int64_t elements_of(Rows const& map, int b, Extent const& size, int channels) {
    return offset_in(map, b - 1, size.t - 1, size.h - 1, size.w - 1) + channels;
}

uint16_t rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ---- the machine: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"

struct SharedMemory {
    std::vector<uint8_t> bytes;

    // Row and column of an operand that a descriptor tells of: 8 rows of 128 bytes are an atom, atoms are a stride
    // apart, and bits 4 to 6 of an address are combined with bits 7 to 9.
    float read(uint64_t descriptor, int row, int column) const {
        auto const start = uint32_t(descriptor & 0x3fff) << 4;
        auto const stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
        uint32_t const linear = start + row / 8 * stride + row % 8 * 128 + column * 2;
        uint32_t const address = linear ^ (linear >> 7 & 7) << 4;
        uint16_t bits;
        std::memcpy(&bits, &bytes.at(address - kBase), 2);
        return widened(bits);
    }
};

bool is_swizzled_k_major(uint64_t descriptor) {
    return descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0 && (descriptor >> 52 & 1) == 0;
}

// The sums of a warpgroup: element (row, column) of the 64 x N block is register `index` of thread `thread`.
struct Owner {
    int thread;
    int index;
};

Owner owner_of(int row, int column) {
    return {row / 16 * 32 + row % 8 * 4 + column % 8 / 2, column / 8 * 4 + row % 16 / 8 * 2 + column % 2};
}

template <int N>
struct Sums {
    std::vector<float> registers = std::vector<float>(128 * N / 2, std::numeric_limits<float>::quiet_NaN());

    float* of(int thread) { return &registers[thread * (N / 2)]; }

    void multiply(SharedMemory const& shared, uint64_t a, uint64_t b, bool accumulate) {
        static float weights[N][16];
        for (int n = 0; n < N; ++n)
            for (int k = 0; k < 16; ++k) weights[n][k] = shared.read(b, n, k);
        for (int m = 0; m < 64; ++m) {
            float row[16];
            for (int k = 0; k < 16; ++k) row[k] = shared.read(a, m, k);
            for (int n = 0; n < N; ++n) {
                Owner const at = owner_of(m, n);
                float sum = 0;
                for (int k = 0; k < 16; ++k) sum += row[k] * weights[n][k];
                float& held = of(at.thread)[at.index];
                held = accumulate ? held + sum : sum;
            }
        }
    }
};

// ---- the thread block, as in sm90_forward.cuh

template <int N>
struct Block {
    using Shape = Tile<N>;

    HopperParams const& p;
    int const samples = int(p.positions / (p.out.t * p.out.h * p.out.w));
    SharedMemory shared{std::vector<uint8_t>(Shape::kBytes, kUnwritten)};
    char const* wrong = nullptr;

    void fetch(TilePlace tile, int step, int stage, Extent const& tap, int channel) {
        uint8_t* const rows = &shared.bytes[stage * Shape::kRowsBytes];
        std::vector<bool> written(Shape::kRowsBytes);
        for (int r = 0; r < Shape::kRowBlocks; ++r)
            for (int thread = 0; thread < sm90::kWarpgroup; ++thread)
                for (int i = 0; i < kCopiesPerBlock; ++i) {
                    int const warp = thread / 32, lane = thread % 32;
                    int const row = first_copied_row(r, warp) + copied_row(lane, i), chunk = copied_chunk(lane);
                    Source const source = source_of(p, place_of(p, tile.first_row + row), tap);
                    auto const* const map = static_cast<uint16_t const*>(source.past ? p.past.data : p.x.data);
                    uint32_t const to = copied_offset(r, warp, lane, i);
                    if (to != sm90::chunk_offset(row, chunk)) wrong = report("a copy leaves its row");
                    if (written.at(to)) wrong = report("a chunk is written twice");
                    written[to] = true;
                    Extent const size = source.past ? Extent{p.past_frames, p.in.h, p.in.w} : p.in;
                    int64_t const from = source.offset + channel + chunk * 8;
                    within(from, 8, elements_of(source.past ? p.past : p.x, samples, size, p.C), "a map");
                    std::memcpy(rows + within(to, 16, Shape::kRowsBytes, "a stage"), map + from, 16);
                }
        auto const* const weights = static_cast<uint16_t const*>(p.weights);
        int64_t const from = packed_stage(tile.column_tile, step, steps_of(p.C, p.kernel), N);
        within(from, Shape::kWeightBytes / 2, packed_size(p.O, p.C, p.kernel), "packed weights");
        std::memcpy(&shared.bytes[Shape::kWeights + stage * Shape::kWeightBytes], weights + from, Shape::kWeightBytes);
    }

    void multiply(int consumer, int step, int stage, std::vector<Sums<N>>& sums) {
        uint64_t const b = sm90::descriptor(kBase + Shape::kWeights + stage * Shape::kWeightBytes);
        uint64_t const a = sm90::descriptor(kBase + stage * Shape::kRowsBytes +
                                            block_row(consumer, 0, Shape::kBlocks) * sm90::kRowBytes);
        if (!is_swizzled_k_major(a) || !is_swizzled_k_major(b)) wrong = report("a descriptor is of another layout");
        for (int k = 0; k < kStepChannels / sm90::kDepth; ++k)
            for (int block = 0; block < Shape::kBlocks; ++block) {
                uint64_t const rows = a + uint64_t(block * sm90::kBlockRows * sm90::kRowBytes >> 4);
                uint64_t const more = sm90::descriptor_step(k);
                sums[block].multiply(shared, rows + more, b + more, step > 0 || k > 0);
            }
    }

    // By one warp.
    void send(TilePlace tile, int consumer, int warp, std::vector<Sums<N>>& sums) {
        uint8_t* const out = &shared.bytes[Shape::kOut + (consumer * 4 + warp) * kOutBytes];
        for (int block = 0; block < Shape::kBlocks; ++block)
            for (int part = 0; part < N / kOutColumns; ++part) {
                int const first_column = tile.column_tile * N + part * kOutColumns;
                if (first_column >= p.O) break;
                uint32_t const first = tile.first_row + block_row(consumer, block, Shape::kBlocks) + kOutRows * warp;
                std::memset(out, kUnwritten, kOutBytes);
                for (int lane = 0; lane < 32; ++lane)
                    for (int i = 0; i < kOutColumns / 2; i += 2) {
                        int const row = sm90::accumulator_row(lane, i), at = sm90::accumulator_column(lane, i);
                        float const* const pair = sums[block].of(warp * 32 + lane) + part * (kOutColumns / 2) + i;
                        int64_t const to = out_offset(row, at / 4) + at % 4 * 4;
                        std::memcpy(out + within(to, 8, kOutBytes, "a warp's bytes"), pair, 8);
                    }
                for (int lane = 0; lane < 32; ++lane)
                    for (int pass = 0; pass < kOutRows / 4; ++pass) {
                        int const row = sent_row(lane, pass), column = sent_column(lane);
                        if (first + row < p.positions) send_eight(out, first + row, row, column, first_column + column);
                    }
            }
    }

    void send_eight(uint8_t const* out, uint32_t position, int row, int chunk_column, int column) {
        Place const o = place_of(p, position);
        float eight[8];
        for (int half = 0; half < 2; ++half) {
            int64_t const from = out_offset(row, chunk_column / 4 + half);
            std::memcpy(eight + 4 * half, out + within(from, 16, kOutBytes, "a warp's bytes"), 16);
        }
        int64_t const to = offset_in(p.y, o.b, o.t, o.h, o.w) + column;
        within(to, 8, elements_of(p.y, samples, p.out, p.O), "y");
        for (int i = 0; i < 8; ++i) {
            float sum = eight[i];
            if (p.bias) sum += widened(static_cast<uint16_t const*>(p.bias)[column + i]);
            if (p.residual.data) {
                int64_t const at = offset_in(p.residual, o.b, o.t, o.h, o.w) + column + i;
                sum += widened(static_cast<uint16_t const*>(p.residual.data)[at]);
            }
            static_cast<uint16_t*>(p.y.data)[to + i] = rounded(sum);
        }
    }

    void run(TilePlace tile) {
        std::vector<Sums<N>> sums[kConsumers];
        for (auto& each : sums) each.resize(Shape::kBlocks);
        sm90::Ring<kStages> ring;
        int step = 0;
        Extent tap;
        for (tap.t = 0; tap.t < p.kernel.t; ++tap.t)
            for (tap.h = 0; tap.h < p.kernel.h; ++tap.h)
                for (tap.w = 0; tap.w < p.kernel.w; ++tap.w)
                    for (int c = 0; c < p.C; c += kStepChannels, ++step, ring.advance()) {
                        fetch(tile, step, ring.stage, tap, c);
                        for (int consumer = 0; consumer < kConsumers; ++consumer) {
                            multiply(consumer, step, ring.stage, sums[consumer]);
                        }
                    }
        if (step != steps_of(p.C, p.kernel)) wrong = report("the steps are not as many as were packed");
        for (int consumer = 0; consumer < kConsumers; ++consumer)
            for (int warp = 0; warp < 4; ++warp) send(tile, consumer, warp, sums[consumer]);
    }
};

template <int N>
char const* run_tiles(HopperParams const& p) {
    auto const column_tiles = uint32_t(ceil_div(p.O, N));
    uint32_t const tiles = (p.positions + Tile<N>::kRows - 1) / Tile<N>::kRows * column_tiles;
    Block<N> block{p};
    for (uint32_t tile = 0; tile < tiles; ++tile) block.run(tile_place(tile, column_tiles, Tile<N>::kRows));
    return block.wrong;
}

Rows rows_of(void* data, int64_t const* strides) { return {data, strides[0], strides[1], strides[2], strides[3]}; }

Extent extent_of(int64_t const* n) { return {int(n[0]), int(n[1]), int(n[2])}; }

}  // namespace

extern "C" {

int64_t packed_elements(int O, int C, int t, int h, int w) { return packed_size(O, C, {t, h, w}); }

// numbers: O, C, strides of the weight (5), the kernel (3), then of every axis 27 beginnings and 27 ends of spans.
char const* pack(uint16_t const* weight, uint16_t* packed, int64_t const* numbers) {
    int const O = int(numbers[0]), C = int(numbers[1]), columns = tile_columns(O);
    int64_t const* const strides = numbers + 2;
    Extent const kernel = extent_of(numbers + 7);
    auto const spans = [&](int axis, int tap) { return numbers + 10 + axis * 54 + tap; };
    for (int64_t n = 0; n < packed_size(O, C, kernel) / 8; ++n) {
        PackedChunk const chunk = packed_chunk(n, C, kernel, columns);
        bool const inside = chunk.tap.t < kernel.t && chunk.tap.h < kernel.h && chunk.tap.w < kernel.w;
        if (chunk.channel + 8 > C || !inside) return report("a packed chunk is of no channels or of no tap");
        int64_t const *t = spans(0, chunk.tap.t), *h = spans(1, chunk.tap.h), *w = spans(2, chunk.tap.w);
        for (int c = 0; c < 8; ++c) {
            float sum = 0;
            if (chunk.output < O) {
                uint16_t const* const from = weight + chunk.output * strides[0] + (chunk.channel + c) * strides[1];
                for (int64_t i = t[0]; i < t[27]; ++i)
                    for (int64_t j = h[0]; j < h[27]; ++j)
                        for (int64_t k = w[0]; k < w[27]; ++k) {
                            sum += widened(from[i * strides[2] + j * strides[3] + k * strides[4]]);
                        }
            }
            packed[n * 8 + c] = rounded(sum);
        }
    }
    return nullptr;
}

// numbers: B, C, O, frames of past, then (t, h, w) of x, y, kernel, stride and origin, then the strides (b, t, h, w) of
// x, past, y and residual. pointers: x, past, y, residual, packed, bias; null for what there is not.
char const* forward(void* const* pointers, int64_t const* numbers) {
    HopperParams p;
    p.C = int(numbers[1]), p.O = int(numbers[2]), p.past_frames = int(numbers[3]);
    p.in = extent_of(numbers + 4), p.out = extent_of(numbers + 7), p.kernel = extent_of(numbers + 10);
    p.stride = extent_of(numbers + 13), p.origin = extent_of(numbers + 16);
    p.positions = uint32_t(numbers[0] * p.out.t * p.out.h * p.out.w);
    p.x = rows_of(pointers[0], numbers + 19), p.past = rows_of(pointers[1], numbers + 23);
    p.y = rows_of(pointers[2], numbers + 27), p.residual = rows_of(pointers[3], numbers + 31);
    p.weights = pointers[4], p.bias = pointers[5];
    try {
        return tile_columns(p.O) == 256 ? run_tiles<256>(p) : run_tiles<128>(p);
    } catch (std::out_of_range const& what) {
        return report(std::string("out of range: ") + what.what());
    }
}

// Whether a quarter of a warp (16 bytes each) or half of it (8 bytes each) meets in a bank of shared memory.
char const* bank_conflicts() {
    auto const meet = [](std::vector<uint32_t> const& addresses, int bytes) {
        std::vector<int> uses(32);
        for (uint32_t const address : addresses)
            for (int word = 0; word < bytes / 4; ++word) {
                if (++uses[(address / 4 + word) % 32] > 1) return true;
            }
        return false;
    };
    std::vector<uint32_t> addresses;
    for (int lane = 0; lane < 32; ++lane) {
        addresses.push_back(copied_offset(0, 0, lane, 0));
        if (lane % 8 == 7 && meet(addresses, 16)) return report("copies of rows meet");
        if (lane % 8 == 7) addresses.clear();
    }
    for (int i = 0; i < kOutColumns / 2; i += 2)
        for (int lane = 0; lane < 32; ++lane) {
            int const row = sm90::accumulator_row(lane, i), at = sm90::accumulator_column(lane, i);
            addresses.push_back(out_offset(row, at / 4) + at % 4 * 4);
            if (lane % 16 == 15 && meet(addresses, 8)) return report("sums on their way out meet when written");
            if (lane % 16 == 15) addresses.clear();
        }
    for (int half = 0; half < 2; ++half)
        for (int lane = 0; lane < 32; ++lane) {
            addresses.push_back(out_offset(sent_row(lane, 0), sent_column(lane) / 4 + half));
            if (lane % 8 == 7 && meet(addresses, 16)) return report("sums on their way out meet when read");
            if (lane % 8 == 7) addresses.clear();
        }
    return nullptr;
}

}  // extern "C"
