// What Python sees of the Hopper kernels: tensors are checked, turned into the structs of sm90.h, and handed on.
#ifdef HUNYUAN_FAST_CUDA

#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <utility>
#include <vector>

#include "causal_conv3d/sm90_layout.h"
#include "common/check.h"
#include "common/registry.h"
#include "common/tensor_caster.h"

namespace py = pybind11;

namespace hunyuan_fast::causal_conv3d {
namespace {

using Triple = std::array<int, 3>;
using Spans = std::vector<std::pair<int, int>>;

constexpr int64_t kMostPositions = std::numeric_limits<int32_t>::max() - 512;  // with room for the last tile

Extent extent_of(Triple const& t) { return {t[0], t[1], t[2]}; }

int narrowed(int64_t n) {
    HUNYUAN_CHECK(n >= 0 && n <= std::numeric_limits<int32_t>::max(), "a size must fit 31 bits, got ", n);
    return int(n);
}

Extent extent_of(TensorView const& map) {
    return {narrowed(map.size[2]), narrowed(map.size[3]), narrowed(map.size[4])};
}

void check_sixteen_bits(TensorView const& t, char const* name, TensorView const& x) {
    HUNYUAN_CHECK(t.dtype == x.dtype && (t.dtype == DType::bf16 || t.dtype == DType::f16), name,
                  " must be bfloat16 or float16, as x, got ", name_of(t.dtype));
    HUNYUAN_CHECK(t.device != kHost && t.device == x.device, name, " must be on a CUDA device, that of x");
}

// (B, C, T, H, W) with adjacent channels, whose rows begin at multiples of 16 bytes.
Rows rows_of(TensorView const& t, char const* name, TensorView const& x, int64_t channels, Extent const& size) {
    check_sixteen_bits(t, name, x);
    bool const fits = t.ndim == 5 && t.size[0] == x.size[0] && t.size[1] == channels && t.size[2] == size.t &&
                      t.size[3] == size.h && t.size[4] == size.w;
    HUNYUAN_CHECK(fits, name, " has the wrong shape: ", t.shape());
    bool aligned = t.stride[1] == 1 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
    for (int axis : {0, 2, 3, 4}) {
        aligned = aligned && (t.size[axis] == 1 || t.stride[axis] % sm90::kChunkElements == 0);
    }
    HUNYUAN_CHECK(aligned, name, " must have adjacent channels, each row at a multiple of 16 bytes");
    return {t.data, t.stride[0], t.stride[2], t.stride[3], t.stride[4]};
}

void check_reach(HopperParams const& p) {
    Extent const k = p.kernel;
    HUNYUAN_CHECK(k.t > 0 && k.h > 0 && k.w > 0 && int64_t(k.t) * k.h * k.w <= 27, "a kernel has 1 to 27 taps");
    HUNYUAN_CHECK(p.in.t > 0 && p.in.h > 0 && p.in.w > 0, "x must not be empty");
    int64_t const last = (int64_t(p.out.t) - 1) * p.stride.t + k.t - 1 - p.origin.t;
    HUNYUAN_CHECK(last < p.in.t, "the last output would need frame ", last, " of ", p.in.t);
}

void check_channels(int64_t C, int64_t O) {
    bool const whole = C > 0 && O > 0 && C % kStepChannels == 0 && O % kOutColumns == 0;
    HUNYUAN_CHECK(whole, "channels must be multiples of 64, got C = ", C, " and O = ", O);
}

int64_t packed_size_of(int O, int C, Triple const& kernel) {
    check_channels(C, O);
    return packed_size(O, C, extent_of(kernel));
}

void check_packed(TensorView const& packed, TensorView const& x, int O, int C, Extent const& kernel) {
    check_sixteen_bits(packed, "packed", x);
    bool const fits = packed.ndim == 1 && packed.is_contiguous() && packed.numel() == packed_size(O, C, kernel);
    HUNYUAN_CHECK(fits && reinterpret_cast<uintptr_t>(packed.data) % 16 == 0, "packed does not fit: ", packed.shape());
}

// Fills one axis of the spans and returns how many there are.
int take_spans(Spans const& given, int64_t taps, HopperWeights::Span (&spans)[27]) {
    HUNYUAN_CHECK(!given.empty() && given.size() <= 27, "an axis has 1 to 27 spans, got ", given.size());
    for (size_t i = 0; i < given.size(); ++i) {
        auto const [begin, end] = given[i];
        HUNYUAN_CHECK(0 <= begin && begin < end && end <= taps && end <= 27, "a span must lie within ", taps,
                      " taps, got [", begin, ", ", end, ")");
        spans[i] = {int8_t(begin), int8_t(end)};
    }
    return int(given.size());
}

// weight (O, C, KT, KH, KW) of any strides into packed: a tap for each span of each axis, the sum of the taps within.
void pack(TensorView const& weight, std::array<Spans, 3> const& spans, TensorView const& packed, uintptr_t stream) {
    HUNYUAN_CHECK(weight.ndim == 5, "weight must have 5 dimensions, got ", weight.shape());
    check_sixteen_bits(weight, "weight", weight);
    check_channels(weight.size[1], weight.size[0]);
    HopperWeights w;
    w.data = weight.data, w.stride_o = weight.stride[0], w.stride_c = weight.stride[1];
    w.O = narrowed(weight.size[0]), w.C = narrowed(weight.size[1]);
    int counts[3];
    for (int axis = 0; axis < 3; ++axis) {
        w.strides[axis] = weight.stride[axis + 2];
        counts[axis] = take_spans(spans[axis], weight.size[axis + 2], w.spans[axis]);
    }
    w.kernel = {counts[0], counts[1], counts[2]};
    check_packed(packed, weight, w.O, w.C, w.kernel);
    auto const run = weight.dtype == DType::bf16 ? pack_hopper_bf16 : pack_hopper_f16;
    run(w, packed.data, reinterpret_cast<void*>(stream));
}

void forward(TensorView const& x, TensorView const& past, TensorView const& packed, TensorView const& bias,
             TensorView const& residual, TensorView const& y, Triple const& kernel, Triple const& stride,
             Triple const& origin, uintptr_t stream) {
    HUNYUAN_CHECK(x.ndim == 5 && y.ndim == 5, "x and y must have 5 dimensions, got ", x.shape(), " and ", y.shape());
    check_channels(x.size[1], y.size[1]);
    HopperParams p;
    p.C = narrowed(x.size[1]), p.O = narrowed(y.size[1]);
    p.in = extent_of(x), p.out = extent_of(y);
    p.kernel = extent_of(kernel), p.stride = extent_of(stride), p.origin = extent_of(origin);
    check_reach(p);
    int64_t const positions = y.size[0] * y.size[2] * y.size[3] * y.size[4];
    HUNYUAN_CHECK(positions > 0 && positions <= kMostPositions, "y must have 1 to ", kMostPositions,
                  " positions, got ", positions);
    p.positions = uint32_t(positions);
    p.x = rows_of(x, "x", x, p.C, p.in);
    p.y = rows_of(y, "y", x, p.O, p.out);
    if (residual.given()) p.residual = rows_of(residual, "residual", x, p.O, p.out);
    if (past.given()) {
        HUNYUAN_CHECK(past.ndim == 5 && past.size[2] > 0, "past must have frames, got ", past.shape());
        p.past_frames = narrowed(past.size[2]);
        p.past = rows_of(past, "past", x, p.C, {p.past_frames, p.in.h, p.in.w});
    }
    check_packed(packed, x, p.O, p.C, p.kernel);
    p.weights = packed.data;
    if (bias.given()) {
        check_sixteen_bits(bias, "bias", x);
        bool const fits = bias.ndim == 1 && bias.size[0] == p.O && bias.is_contiguous();
        HUNYUAN_CHECK(fits && reinterpret_cast<uintptr_t>(bias.data) % 16 == 0, "bias must be (", p.O,
                      ",), contiguous, at a multiple of 16 bytes, got ", bias.shape());
        p.bias = bias.data;
    }
    auto const run = x.dtype == DType::bf16 ? run_hopper_bf16 : run_hopper_f16;
    run(p, reinterpret_cast<void*>(stream));
}

}  // namespace

HUNYUAN_FAST_BIND(causal_conv3d_hopper, m) {
    using release_gil = py::call_guard<py::gil_scoped_release>;
    m.def("causal_conv3d_packed_size_hopper", &packed_size_of);
    m.def("causal_conv3d_pack_hopper", &pack, release_gil());
    m.def("causal_conv3d_forward_hopper", &forward, release_gil());
}

}  // namespace hunyuan_fast::causal_conv3d

#endif  // HUNYUAN_FAST_CUDA
