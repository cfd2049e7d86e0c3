// Matrix products of a warpgroup: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
#include <algorithm>
#include <cmath>
#include <cstring>

#include "machine/block.h"
#include "machine/numbers.h"

namespace hopper {
namespace {

constexpr int kRows = 64;
// What registers hold of sums that no wait covers: a signalling NaN, which no arithmetic leaves as it is.
constexpr uint32_t kInFlight = 0x7f95a5a5;

float in_flight() {
    float value;
    std::memcpy(&value, &kInFlight, 4);
    return value;
}

bool is_in_flight(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits == kInFlight;
}

int width_of(Number number) { return number == Number::e4m3 ? 1 : 2; }
int depth_of(Number number) { return 32 / width_of(number); }

Group& group_of(Fiber const& fiber) { return block().groups[fiber.number / kGroup]; }
Warp& own_warp() { return block().warps[warp_of(self())]; }

Fiber& fiber_of(int lane) { return block().fibers[size_t(warp_of(self()) * kWarp + lane)]; }

// ---- descriptors

// Fields in units of 16 bytes, of what they tell in bytes.
struct Descriptor {
    uint32_t start;
    uint32_t leading;
    uint32_t stride;
};

Descriptor decoded(uint64_t bits, char const* operand) {
    auto const field = [&](int from) { return uint32_t(bits >> from & 0x3fff) << 4; };
    auto const all = (unsigned long long)bits;
    if (bits >> 62 != 1) fail("multiply: the descriptor of %s, %016llx, is not of 128-byte swizzling", operand, all);
    constexpr uint64_t kFields = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 1ull << 62;
    if (bits & ~kFields) fail("multiply: the descriptor of %s, %016llx, has bits outside its fields", operand, all);
    return {field(0), field(16), field(32)};
}

// Where the 16-byte chunks of an operand are: neighbours along K, two to a row of M or N.
std::vector<uint32_t> chunks_along_k(Descriptor const& d, int rows, char const* operand) {
    if (d.start % 128 > 96 || d.start / 128 % 8 != 0) {
        fail("multiply: %s begins at byte %lld, which is in no first row of eight", operand,
             (long long)d.start - kSharedBase);
    }
    std::vector<uint32_t> chunks;
    for (int row = 0; row < rows; ++row)
        for (uint32_t chunk = 0; chunk < 2; ++chunk) {
            uint32_t const in_row = d.start + uint32_t(row % 8) * 128 + chunk * kChunk;
            chunks.push_back(swizzled(in_row + uint32_t(row / 8) * d.stride));
        }
    return chunks;
}

// Neighbours along M or N: of 16 rows along K, 64 values lie together, the next 64 lie a leading dimension further.
// Eight such rows are a stride from the next eight.
std::vector<uint32_t> chunks_along_mn(Descriptor const& d, int count, char const* operand) {
    if (d.start % 1024 != 0) {
        fail("multiply: %s begins at byte %lld, which is no multiple of 1024", operand,
             (long long)d.start - kSharedBase);
    }
    std::vector<uint32_t> chunks;
    for (int k = 0; k < 16; ++k)
        for (uint32_t chunk = 0; chunk < uint32_t(count) / 8; ++chunk) {
            chunks.push_back(swizzled(d.start + uint32_t(k / 8) * d.stride + uint32_t(k % 8) * 128 +
                                      chunk / 8 * d.leading + chunk % 8 * kChunk));
        }
    return chunks;
}

std::vector<uint32_t> chunks_of(uint64_t bits, bool along_mn, int count, char const* operand) {
    Descriptor const d = decoded(bits, operand);
    if (d.stride % 1024 != 0 || d.stride == 0) {
        fail("multiply: %s has groups of eight rows %u bytes apart", operand, d.stride);
    }
    if (!along_mn) return chunks_along_k(d, count, operand);
    if (count > 64 && (d.leading % 1024 != 0 || d.leading == 0)) {
        fail("multiply: %s has blocks of 64 neighbours %u bytes apart", operand, d.leading);
    }
    return chunks_along_mn(d, count, operand);
}

// ---- numbers of operands

// (count, depth), or (depth, count) where `across`.
void widen(Product const& product, std::vector<uint32_t> const& chunks, bool along_mn, int count, bool across,
           float* to) {
    Number const number = product.call.number;
    int const depth = depth_of(number), per_chunk = int(kChunk) / width_of(number);
    for (size_t c = 0; c < chunks.size(); ++c) {
        float values[kChunk];
        char const* const from = block().shared.at(chunks[c], kChunk, kChunk, "multiply");
        widen_chunk(number, from, values);
        int const chunks_per_row = along_mn ? count / 8 : 2;
        int const row = int(c) / chunks_per_row, first = int(c) % chunks_per_row * per_chunk;
        for (int i = 0; i < per_chunk; ++i) {
            int const n = along_mn ? first + i : row, k = along_mn ? row : first + i;
            to[across ? k * count + n : n * depth + k] = values[i];
        }
    }
}

// Register r of a thread: two 16-bit values or four 8-bit ones, of row lane / 4 or that + 8, of columns that begin
// where the lane's share of half the depth does.
void widen_fragments(Product const& product, float* to) {
    Number const number = product.call.number;
    int const depth = depth_of(number), each = 4 / width_of(number);
    for (int thread = 0; thread < kGroup; ++thread)
        for (int r = 0; r < 4; ++r) {
            int const lane = thread % kWarp, row = thread / kWarp * 16 + lane / 4 + r % 2 * 8;
            for (int i = 0; i < each; ++i) {
                int const column = r / 2 * (depth / 2) + lane % 4 * each + i;
                uint32_t const bits = product.held[thread][r] >> (32 / each * i);
                to[row * depth + column] = widened(number, bits);
            }
        }
}

void multiply_add(float* sums, float const* a, float const* b, int columns, int depth) {
    for (int m = 0; m < kRows; ++m)
        for (int k = 0; k < depth; ++k) {
            float const x = a[m * depth + k];
            for (int n = 0; n < columns; ++n) sums[m * columns + n] += x * b[k * columns + n];
        }
}

void compute(Product& product) {
    product.computed = true;
    if (product.commit) return;
    static float a[kRows * 32], b[256 * 32];
    auto const& call = product.call;
    if (call.fragment != nullptr) {
        widen_fragments(product, a);
    } else {
        widen(product, product.a, call.a_along_m, kRows, false, a);
    }
    widen(product, product.b, call.b_along_n, call.columns, true, b);
    auto& sums = product.sums->values;
    if (!call.accumulate) std::fill(sums.begin(), sums.end(), 0.0f);
    multiply_add(sums.data(), a, b, call.columns, depth_of(call.number));
}

// All up to a number, in order.
void compute_until(Group& group, uint64_t end) {
    for (; group.computed < end; ++group.computed) compute(group.at(group.computed));
}

// ---- what a warp asks for

// Of the 64 rows: the one whose sum register i of a thread holds, and its column.
int row_of(int thread, int i) { return thread / kWarp * 16 + thread % kWarp / 4 + i % 4 / 2 * 8; }
int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

int first_in_group() { return warp_of(self()) % 4 * kWarp; }

// The sums that this warp already has under way in the same registers.
Warp::Held* held_sums(Warp& warp, float const* registers) {
    for (auto& held : warp.held) {
        if (held.sums->registers[first_in_group()] == registers) return &held;
    }
    return nullptr;
}

void check_same(ProductCall const& one, ProductCall const& other) {
    bool const same = one.number == other.number && one.columns == other.columns && one.a == other.a &&
                      one.b == other.b && one.a_along_m == other.a_along_m && one.b_along_n == other.b_along_n &&
                      (one.fragment == nullptr) == (other.fragment == nullptr) && one.accumulate == other.accumulate;
    if (!same) fail("multiply: threads of a warpgroup ask for different products");
}

// The warp's registers become part of the sums.
void take_sums(Sums& sums, bool accumulate) {
    int const first = first_in_group();
    for (int lane = 0; lane < kWarp; ++lane) {
        float* const registers = brought<ProductCall>(lane).sums;
        sums.registers[first + lane] = registers;
        for (int i = 0; i < sums.columns / 2; ++i) {
            if (accumulate && is_in_flight(registers[i])) {
                fail("multiply: thread %d adds to sums that a product without its wait still holds", self().number);
            }
            float& value = sums.values[size_t(row_of(first + lane, i) * sums.columns + column_of(first + lane, i))];
            value = registers[i];
            registers[i] = in_flight();
        }
    }
}

void take_fragments(Product& product) {
    int const first = first_in_group();
    for (int lane = 0; lane < kWarp; ++lane) {
        uint32_t const* const registers = brought<ProductCall>(lane).fragment;
        product.fragments[first + lane] = registers;
        std::memcpy(product.held[first + lane], registers, sizeof product.held[0]);
    }
}

// The next of the warpgroup's products for this warp; made where it is the first warp to ask.
Product& next_product(Group& group, Warp& warp) {
    if (warp.next == group.end()) group.products.push_back(std::make_unique<Product>());
    return group.at(warp.next);
}

// By the last of the four warps.
void issue(Group& group, uint64_t number) {
    Product& product = group.at(number);
    if (!product.commit) {
        auto const& call = product.call;
        if (call.fragment == nullptr) product.a = chunks_of(call.a, call.a_along_m, kRows, "A");
        product.b = chunks_of(call.b, call.b_along_n, call.columns, "B");
        Stamp const done = {group.component, uint32_t(number) + 1};
        for (auto const* operand : {&product.a, &product.b})
            for (uint32_t const chunk : *operand) block().shared.begin_read(chunk, product.known, done, "multiply");
    }
    if (machine.product_timing == Timing::early) compute_until(group, number + 1);
    wake_all(group.waiting);
}

void ask(ProductCall const& call) {
    for (int lane = 0; lane < kWarp; ++lane) check_same(call, brought<ProductCall>(lane));
    if (int(block().fibers.size()) % kGroup != 0) fail("multiply: the block is not of whole warpgroups");
    Group& group = group_of(self());
    Warp& warp = own_warp();
    Product& product = next_product(group, warp);
    if (product.commit) fail("multiply: another warp of the warpgroup ends a group of products here");
    Warp::Held* held = held_sums(warp, brought<ProductCall>(0).sums);
    if (!warp.fenced && (held == nullptr || call.fragment != nullptr)) {
        fail("multiply: thread %d has not called fence_products since it touched registers of a product",
             self().number);
    }
    if (product.warps == 0) {
        product.call = call;
        product.sums = held != nullptr ? held->sums : std::make_shared<Sums>();
        product.sums->columns = call.columns;
        product.sums->values.resize(size_t(kRows * call.columns));
        product.known = self().clock;
    }
    for (int lane = 0; lane < kWarp; ++lane) product.known.keep(fiber_of(lane).clock);
    check_same(call, product.call);
    if (held != nullptr && held->sums != product.sums) fail("multiply: warps of a warpgroup add to different sums");
    if (held == nullptr) {
        take_sums(*product.sums, call.accumulate);
        warp.held.push_back({product.sums, 0});
        held = &warp.held.back();
    }
    if (held->sums->columns != call.columns) {
        fail("multiply: sums of %d columns used as %d", held->sums->columns, call.columns);
    }
    held->last = warp.next;
    if (call.fragment != nullptr) take_fragments(product);
    if (++product.warps == 4) issue(group, warp.next);
    ++warp.next;
}

// ---- waits

// What its product needed may change from here on.
void finish(Product& product) {
    if (product.finished) return;
    product.finished = true;
    for (auto const* operand : {&product.a, &product.b})
        for (uint32_t const chunk : *operand) block().shared.end_read(chunk, "multiply");
    for (int thread = 0; thread < kGroup && product.fragments[thread] != nullptr; ++thread) {
        if (std::memcmp(product.held[thread], product.fragments[thread], sizeof product.held[0]) != 0) {
            fail("registers of operand A changed, or went out of scope, in thread %d of a warpgroup before the wait",
                 thread);
        }
    }
}

void give_sums(Sums& sums) {
    int const first = first_in_group();
    for (int thread = first; thread < first + kWarp; ++thread)
        for (int i = 0; i < sums.columns / 2; ++i) {
            float& value = sums.registers[thread][i];
            if (!is_in_flight(value)) {
                fail("thread %d of a warpgroup wrote sums before the wait for their products", thread);
            }
            value = sums.values[size_t(row_of(thread, i) * sums.columns + column_of(thread, i))];
        }
}

void settle(int pending) {
    Group& group = group_of(self());
    Warp& warp = own_warp();
    warp.fenced = false;
    int const covered = int(warp.groups.size()) - pending;
    if (covered <= 0) return;
    uint64_t const end = warp.groups[size_t(covered - 1)] + 1;
    auto const issued = [&] { return end <= group.first || group.at(end - 1).warps == 4; };
    while (!issued()) {
        group.waiting.push_back(&self());
        block_for({Waiting::issue, "wait_for_products"});
    }
    compute_until(group, end);
    for (int lane = 0; lane < kWarp; ++lane) fiber_of(lane).clock.learn({group.component, uint32_t(end)});
    for (uint64_t n = group.first; n < end; ++n) finish(group.at(n));
    for (size_t i = warp.held.size(); i-- > 0;) {
        if (warp.held[i].last >= end) continue;
        give_sums(*warp.held[i].sums);
        warp.held.erase(warp.held.begin() + long(i));
    }
    for (; !group.products.empty() && group.products.front()->finished; ++group.first) group.products.pop_front();
}

}  // namespace

void multiply(ProductCall const& call) {
    together("wgmma.mma_async", kAll, &call, [&] { ask(call); });
}

void fence_products() {
    together("wgmma.fence", kAll, nullptr, [] { own_warp().fenced = true; });
}

void commit_products() {
    together("wgmma.commit_group", kAll, nullptr, [] {
        Group& group = group_of(self());
        Warp& warp = own_warp();
        Product& product = next_product(group, warp);
        if (product.warps > 0 && !product.commit) fail("commit_products: another warp asks for a product here");
        product.commit = true;
        warp.groups.push_back(warp.next);
        if (++product.warps == 4) issue(group, warp.next);
        ++warp.next;
    });
}

void wait_for_products(int pending) {
    together("wgmma.wait_group", kAll, nullptr, [&] { settle(pending); });
}

bool compute_some_product() {
    InBlock const there(*machine.cluster[machine.random() % machine.cluster.size()]);
    auto& groups = block().groups;
    Group& group = groups[machine.random() % groups.size()];
    if (group.computed >= group.end() || group.at(group.computed).warps < 4) return false;
    compute_until(group, group.computed + 1);
    return true;
}

// When all threads have left.
void check_no_products() {
    for (auto const& group : block().groups)
        for (auto const& product : group.products) {
            if (!product->finished) fail("the block ends before the wait for its products");
        }
    for (size_t w = 0; w < block().warps.size(); ++w) {
        if (block().warps[w].registers != block().warps[w / 4 * 4].registers) {
            fail("warps of a warpgroup have different counts of registers");
        }
    }
}

}  // namespace hopper
