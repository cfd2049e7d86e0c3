// Everything beyond a chunk is double: what the chunks have added up is merged in their order, so that the bits
// depend on the size of a sample alone.
#include "group_norm_silu/cpu.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "common/cpu_isa.h"
#include "common/parallel.h"

namespace hunyuan_fast::group_norm_silu {
namespace {

// Two vectors of the widest instruction set: a whole number of pairs in every one.
constexpr int64_t kWidestPair = 32;
// Lanes that are added up side by side, so that an addition need not wait for the one before.
constexpr int64_t kLeastPeriod = 256;
// Values of a chunk: some 10 microseconds of work at least, and not so many that their sums in fp32 show.
constexpr int64_t kSmallestChunk = 8 * 1024;
constexpr int64_t kLargestChunk = 64 * 1024;
constexpr int64_t kWantedChunks = 64;

CpuKernels const& kernels(DType dtype, bool silu) {
    switch (cpu_isa()) {
#ifdef HUNYUAN_FAST_X86
        case CpuIsa::avx512: return avx512_kernels(dtype, silu);
        case CpuIsa::avx2: return avx2_kernels(dtype, silu);
#endif
        default: return plain_kernels(dtype, silu);
    }
}

template <class Body>
void for_each_chunk(Sizes const& sizes, int num_threads, Body const& body) {
    parallel_for(sizes.B * sizes.chunks, 1, num_threads, body);
}

// Calls use(chunk, its sums) for every chunk.
template <class Make, class Use>
void with_sums(Sizes const& sizes, int num_threads, Make const& make, Use const& use) {
    for_each_chunk(sizes, num_threads, [&](int64_t first, int64_t last) {
        std::unique_ptr<float[]> const room(new float[size_t(kRooms * sizes.period)]);
        for (int64_t chunk = first; chunk < last; ++chunk) use(chunk, make(chunk, room.get()));
    });
}

int64_t values_of_chunk(Sizes const& sizes, int64_t chunk) {
    return std::min(sizes.chunk, sizes.values() - chunk % sizes.chunks * sizes.chunk);
}

// A mean and the sum of squares about it of some values. 0 is no lower bound for NaN.
struct Moments {
    double count = 0, mean = 0, squares = 0;
};

double at_least_zero(double v) { return v < 0 ? 0 : v; }

// Merges moments(i) for i in [0, count): the mean first, so that no difference of large sums is taken.
template <class Part>
Moments merged(int64_t count, Part const& moments) {
    Moments all;
    double total = 0;
    for (int64_t i = 0; i < count; ++i) {
        Moments const part = moments(i);
        all.count += part.count;
        total += part.count * part.mean;
    }
    if (all.count == 0) return all;
    all.mean = total / all.count;
    for (int64_t i = 0; i < count; ++i) {
        Moments const part = moments(i);
        double const distance = part.mean - all.mean;
        all.squares += part.squares + part.count * distance * distance;
    }
    return all;
}

// The moments of a group in a chunk of `values`, from its lanes: the mean first, as in `merged`.
Moments moments_of_group(Sizes const& sizes, Sums const& sums, int64_t values, int64_t group) {
    int64_t const lanes = std::min(values, sizes.period), channels = sizes.channels();
    int64_t const periods = values / sizes.period, rest = values % sizes.period;
    double const counts[] = {double(periods), double(periods + 1)};
    double const shares[] = {1.0 / counts[0], 1.0 / counts[1]};  // the first is not met where it is infinite
    Moments all;
    all.count = double(values / sizes.G);
    double total = 0;
    for (int64_t first = group * channels; first < lanes; first += sizes.C) {
        double const count = counts[first < rest];
        for (int64_t lane = first; lane < first + channels; ++lane) {
            total += count * double(sums.centre[lane]) + double(sums.first[lane]);
        }
    }
    all.mean = total / all.count;
    for (int64_t first = group * channels; first < lanes; first += sizes.C) {
        double const count = counts[first < rest], share = shares[first < rest];
        for (int64_t lane = first; lane < first + channels; ++lane) {
            double const mean = double(sums.first[lane]) * share;
            double const distance = double(sums.centre[lane]) + mean - all.mean;
            double const within = double(sums.second[lane]) - double(sums.first[lane]) * mean;
            all.squares += at_least_zero(within) + count * distance * distance;
        }
    }
    return all;
}

// What a group is normalised with.
struct Scale {
    double mean, rstd, rest;  // rest: of the mean, which rounding it to a float has lost
    float centre;

    Scale(Norm const& norm, Sizes const& sizes, int64_t b, int64_t g) {
        int64_t const each = sizes.B * sizes.G;
        double const* stats = norm.stats + b * sizes.G + g;
        mean = stats[each];
        rstd = 1.0 / std::sqrt(stats[2 * each] / stats[0] + norm.eps);
        centre = float(mean);
        rest = mean - double(centre);
    }
};

class LineBuilder {
public:
    LineBuilder(CpuKernels const& run, Sizes const& sizes, Lines& lines) : run_(run), sizes_(sizes) {
        room_.reset(new float[size_t(sizes.B * 2 * kLines * sizes.period)]);
        lines = {room_.get(), sizes.period};
        lines_ = lines;
    }

    // value(c) for the channels of a sample, in every lane. Pairs are rounded to 16 bits on the premise that a NaN
    // has nothing in its lower half.
    template <class Value>
    void fill(int64_t b, int line, Value const& value) {
        float* const consecutive = lines_.of(b, 1, line);
        for (int64_t c = 0; c < sizes_.C; ++c) {
            float const v = float(value(c));
            consecutive[c] = v == v ? v : float(NAN);
        }
        for (int64_t i = sizes_.C; i < sizes_.period; ++i) consecutive[i] = consecutive[i - sizes_.C];
        float* const pairs = lines_.of(b, 0, line);
        std::copy_n(consecutive, sizes_.period, pairs);
        run_.order(pairs, sizes_.period);
    }

private:
    CpuKernels const& run_;
    Sizes const& sizes_;
    Lines lines_;
    std::unique_ptr<float[]> room_;
};

std::vector<Scale> scales_of(Norm const& norm, Sizes const& sizes, int64_t b) {
    std::vector<Scale> scales;
    for (int64_t g = 0; g < sizes.G; ++g) scales.emplace_back(norm, sizes, b, g);
    return scales;
}

void fill_affine(LineBuilder& lines, Norm const& norm, Sizes const& sizes, int64_t b) {
    std::vector<Scale> const scales = scales_of(norm, sizes, b);
    auto const of = [&](int64_t c) -> Scale const& { return scales[size_t(c / sizes.channels())]; };
    lines.fill(b, kCentre, [&](int64_t c) { return of(c).centre; });
    lines.fill(b, kScale, [&](int64_t c) { return of(c).rstd * double(norm.weight[c]); });
    lines.fill(b, kShift, [&](int64_t c) {
        return double(norm.bias[c]) - of(c).rest * of(c).rstd * double(norm.weight[c]);
    });
}

// The sums of a sample over all its places, chunk after chunk: of dz, then of dz (x - centre), (2, C).
std::vector<double> total_of(Sizes const& sizes, double const* partials) {
    std::vector<double> total(size_t(2 * sizes.C));
    for (int64_t chunk = 0; chunk < sizes.chunks; ++chunk) {
        double const* part = partials + chunk * 2 * sizes.C;
        for (int64_t i = 0; i < 2 * sizes.C; ++i) total[size_t(i)] += part[i];
    }
    return total;
}

// From the sums of a sample to the lines of dx; adds to the gradients of weight and bias.
void fill_gradient(LineBuilder& lines, Norm const& norm, Sizes const& sizes, int64_t b, double const* partials,
                   std::vector<double>& dweight, std::vector<double>& dbias) {
    std::vector<Scale> const scales = scales_of(norm, sizes, b);
    std::vector<double> const total = total_of(sizes, partials);
    std::vector<double> slope(size_t(sizes.G)), level(size_t(sizes.G));
    double const count = double(sizes.S * sizes.channels());
    for (int64_t c = 0; c < sizes.C; ++c) {
        size_t const g = size_t(c / sizes.channels());
        double const sum = total[size_t(c)], weight = norm.weight[c];
        double const product = (total[size_t(sizes.C + c)] - scales[g].rest * sum) * scales[g].rstd;
        dweight[size_t(c)] += product;
        dbias[size_t(c)] += sum;
        slope[g] -= weight * product * scales[g].rstd * scales[g].rstd / count;
        level[g] -= weight * sum * scales[g].rstd / count;
    }
    for (size_t g = 0; g < slope.size(); ++g) level[g] -= slope[g] * scales[g].rest;
    lines.fill(b, kSlope, [&](int64_t c) { return slope[size_t(c / sizes.channels())]; });
    lines.fill(b, kLevel, [&](int64_t c) { return level[size_t(c / sizes.channels())]; });
}

}  // namespace

void divide(Sizes& sizes) {
    int64_t const least = std::lcm(sizes.C, kWidestPair);
    sizes.period = least * ((kLeastPeriod + least - 1) / least);
    int64_t const wanted = std::clamp(sizes.values() / kWantedChunks, kSmallestChunk, kLargestChunk);
    sizes.chunk = sizes.period * std::max<int64_t>(1, wanted / sizes.period);
    sizes.chunks = (sizes.values() + sizes.chunk - 1) / sizes.chunk;
}

void statistics_cpu(DType dtype, StatisticsParams const& params, double* stats, int num_threads) {
    CpuKernels const& run = kernels(dtype, false);
    Sizes const& sizes = params.sizes;
    std::vector<Moments> parts(size_t(sizes.B * sizes.chunks * sizes.G));
    with_sums(
        sizes, num_threads, [&](int64_t chunk, float* room) { return run.statistics(params, chunk, room); },
        [&](int64_t chunk, Sums const& sums) {
            int64_t const values = values_of_chunk(sizes, chunk);
            for (int64_t g = 0; g < sizes.G; ++g) {
                parts[size_t(chunk * sizes.G + g)] = moments_of_group(sizes, sums, values, g);
            }
        });
    int64_t const each = sizes.B * sizes.G;
    for (int64_t i = 0; i < each; ++i) {
        int64_t const first = i / sizes.G * sizes.chunks * sizes.G + i % sizes.G;
        Moments const all =
            merged(sizes.chunks, [&](int64_t chunk) { return parts[size_t(first + chunk * sizes.G)]; });
        stats[i] = all.count, stats[each + i] = all.mean, stats[2 * each + i] = all.squares;
    }
}

void forward_cpu(DType dtype, Norm const& norm, ForwardParams params, int num_threads) {
    CpuKernels const& run = kernels(dtype, norm.silu);
    LineBuilder lines(run, params.sizes, params.lines);
    for (int64_t b = 0; b < params.sizes.B; ++b) fill_affine(lines, norm, params.sizes, b);
    for_each_chunk(params.sizes, num_threads,
                   [&](int64_t first, int64_t last) { run.forward(params, first, last); });
}

void backward_cpu(DType dtype, Norm const& norm, BackwardParams params, float* dweight, float* dbias,
                  int num_threads) {
    CpuKernels const& run = kernels(dtype, norm.silu);
    Sizes const& sizes = params.sizes;
    int64_t const C = sizes.C;
    LineBuilder lines(run, sizes, params.lines);
    for (int64_t b = 0; b < sizes.B; ++b) fill_affine(lines, norm, sizes, b);
    std::vector<double> partials(size_t(sizes.B * sizes.chunks * 2 * C));
    with_sums(
        sizes, num_threads, [&](int64_t chunk, float* room) { return run.gradient_sums(params, chunk, room); },
        [&](int64_t chunk, Sums const& sums) {
            double* const part = partials.data() + chunk * 2 * C;
            for (int64_t first = 0; first < sizes.period; first += C) {
                for (int64_t c = 0; c < C; ++c) {
                    part[c] += double(sums.first[first + c]);
                    part[C + c] += double(sums.second[first + c]);
                }
            }
        });
    std::vector<double> weights(static_cast<size_t>(C)), biases(static_cast<size_t>(C));
    for (int64_t b = 0; b < sizes.B; ++b) {
        fill_gradient(lines, norm, sizes, b, partials.data() + b * sizes.chunks * 2 * C, weights, biases);
    }
    std::copy(weights.begin(), weights.end(), dweight);
    std::copy(biases.begin(), biases.end(), dbias);
    for_each_chunk(sizes, num_threads, [&](int64_t first, int64_t last) { run.backward(params, first, last); });
}

}  // namespace hunyuan_fast::group_norm_silu
