// What Python sees: tensors are checked, turned into the structs of params.h, and handed to a launcher.
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "causal_conv3d/cpu.h"
#include "common/check.h"
#include "common/registry.h"
#include "common/streaming.h"
#include "common/tensor_caster.h"

namespace py = pybind11;

namespace hunyuan_fast::causal_conv3d {
namespace {

using Triple = std::array<int64_t, 3>;
using Spans = std::vector<std::pair<int64_t, int64_t>>;

Size size_of(Triple const& t) { return {t[0], t[1], t[2]}; }
Size size_of(TensorView const& map) { return {map.size[2], map.size[3], map.size[4]}; }

void check(TensorView const& t, char const* name, int ndim) {
    HUNYUAN_CHECK(t.ndim == ndim, name, " must have ", ndim, " dimensions, got ", t.shape());
    HUNYUAN_CHECK(t.device == kHost, name, " must be in host memory");
    HUNYUAN_CHECK(t.dtype == DType::f32, name, " must be float32, got ", name_of(t.dtype));
}

// (B, C, T, H, W) with adjacent channels.
Map map_of(TensorView const& t, char const* name, int64_t B, int64_t C) {
    check(t, name, 5);
    HUNYUAN_CHECK(t.size[0] == B && t.size[1] == C, name, " must be (", B, ", ", C, ", T, H, W), got ", t.shape());
    HUNYUAN_CHECK(C <= 1 || t.stride[1] == 1, name, " must be channels-last");
    return {t.as<float>(), t.stride[0], t.stride[2], t.stride[3], t.stride[4]};
}

bool fits(TensorView const& map, Size const& size) {
    return map.size[2] == size.t && map.size[3] == size.h && map.size[4] == size.w;
}

// Edges are repeated in every direction but one: there is no frame after the last.
void check_reach(Params const& p) {
    HUNYUAN_CHECK(p.in.count() > 0, "x must not be empty");
    HUNYUAN_CHECK(p.kernel.count() > 0 && p.kernel.count() <= 27, "a kernel has 1 to 27 taps, got ", p.kernel.count());
    int64_t const last = (p.out.t - 1) * p.stride.t + p.kernel.t - 1 - p.origin.t;
    HUNYUAN_CHECK(last < p.in.t, "the last output would need frame ", last, " of ", p.in.t);
}

Params params_of(TensorView const& x, TensorView const& past, TensorView const& y, TensorView const& residual,
                 int64_t O, Triple const& kernel, Triple const& stride, Triple const& origin) {
    check(x, "x", 5);
    check(y, "y", 5);
    Params p;
    p.B = x.size[0], p.C = x.size[1], p.O = O;
    p.in = size_of(x), p.out = size_of(y);
    p.kernel = size_of(kernel), p.stride = size_of(stride), p.origin = size_of(origin);
    p.x = map_of(x, "x", p.B, p.C);
    p.y = map_of(y, "y", p.B, O);
    if (past.given()) {
        p.past = map_of(past, "past", p.B, p.C);
        p.past_frames = past.size[2];
        HUNYUAN_CHECK(p.past_frames > 0, "past must have frames, got ", past.shape());
        HUNYUAN_CHECK(fits(past, {p.past_frames, p.in.h, p.in.w}), "past does not fit x: ", past.shape());
    }
    if (residual.given()) {
        p.residual = map_of(residual, "residual", p.B, O);
        HUNYUAN_CHECK(fits(residual, p.out), "residual does not fit y: ", residual.shape());
    }
    check_reach(p);
    return p;
}

// (B, C).
float const* vectors_of(TensorView const& t, char const* name, Params const& p) {
    check(t, name, 2);
    HUNYUAN_CHECK(t.size[0] == p.B && t.size[1] == p.C && t.is_contiguous(), name, " must be (", p.B, ", ", p.C,
                  "), contiguous, got ", t.shape());
    return t.as<float>();
}

int64_t packed_size(int64_t O, int64_t C, Triple const& kernel) {
    Packing const packing = packing_cpu(O, C);
    return packing.blocks * packing.lanes * C * size_of(kernel).count();
}

std::vector<Span> spans_of(Spans const& given, int64_t taps, int64_t& most) {
    std::vector<Span> spans;
    int64_t within = 0;
    for (auto const& [begin, end] : given) {
        HUNYUAN_CHECK(0 <= begin && begin < end && end <= taps, "a span must lie within ", taps, " taps, got [", begin,
                      ", ", end, ")");
        spans.push_back({begin, end});
        within += end - begin;
    }
    most *= within;
    return spans;
}

// weight (O, C, KT, KH, KW) of any strides into packed, of packed_size elements: a kernel with a tap for each span of
// each axis, the sum of the taps within.
void pack(TensorView const& weight, std::array<Spans, 3> const& spans, TensorView const& packed, int num_threads) {
    check(weight, "weight", 5);
    check(packed, "packed", 1);
    auto const& [s, size] = std::tie(weight.stride, weight.size);
    Weights w{weight.as<float>(), s[0], s[1], s[2], s[3], s[4], {}, {}, {}};
    int64_t most = 1;
    w.t = spans_of(spans[0], size[2], most);
    w.h = spans_of(spans[1], size[3], most);
    w.w = spans_of(spans[2], size[4], most);
    HUNYUAN_CHECK(most <= 27, "spans have at most 27 taps in all, got ", most);
    Triple const kernel{int64_t(w.t.size()), int64_t(w.h.size()), int64_t(w.w.size())};
    Params p;
    p.O = size[0], p.C = size[1], p.kernel = size_of(kernel);
    HUNYUAN_CHECK(packed.is_contiguous() && packed.numel() == packed_size(p.O, p.C, kernel),
                  "packed does not fit the weight: ", packed.shape());
    pack_cpu(p, w, packed.as<float>(), num_threads);
}

void forward(TensorView const& x, TensorView const& past, TensorView const& packed, TensorView const& bias,
             TensorView const& scale, TensorView const& shift, TensorView const& residual, TensorView const& y,
             Triple const& kernel, Triple const& stride, Triple const& origin, int num_threads) {
    check(y, "y", 5);
    int64_t const O = y.size[1];
    Params p = params_of(x, past, y, residual, O, kernel, stride, origin);
    check(packed, "packed", 1);
    HUNYUAN_CHECK(packed.is_contiguous() && packed.numel() == packed_size(O, p.C, kernel),
                  "packed does not fit: ", packed.shape());
    p.weights = packed.as<float>();
    if (bias.given()) {
        check(bias, "bias", 1);
        HUNYUAN_CHECK(bias.size[0] == O && bias.is_contiguous(), "bias must be (", O, ",), got ", bias.shape());
        p.bias = bias.as<float>();
    }
    HUNYUAN_CHECK(scale.given() == shift.given(), "scale and shift go together");
    if (scale.given()) {
        p.scale = vectors_of(scale, "scale", p);
        p.shift = vectors_of(shift, "shift", p);
    }
    run_cpu(p, num_threads);
}

}  // namespace

HUNYUAN_FAST_BIND(causal_conv3d, m) {
    using release_gil = py::call_guard<py::gil_scoped_release>;
    m.def("causal_conv3d_prefer_huge_pages", &prefer_huge_pages);
    m.def("causal_conv3d_packed_size_cpu", &packed_size);
    m.def("causal_conv3d_pack_cpu", &pack, release_gil());
    m.def("causal_conv3d_forward_cpu", &forward, release_gil());
}

}  // namespace hunyuan_fast::causal_conv3d
