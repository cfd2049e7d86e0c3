// What Python sees: tensors are checked, turned into the structs of params.h, and handed to a launcher.
#include "common/check.h"
#include "common/registry.h"
#include "common/tensor_caster.h"
#include "fused_modulation/cpu.h"

namespace py = pybind11;

namespace hunyuan_fast::fused_modulation {
namespace {

void check(TensorView const& t, char const* name, DType dtype, int device, std::initializer_list<int64_t> size) {
    HUNYUAN_CHECK(t.dtype == dtype, name, " must be ", name_of(dtype), ", got ", name_of(t.dtype));
    HUNYUAN_CHECK(t.device == device, name, " is on another device than x");
    bool fits = t.ndim == static_cast<int>(size.size());
    for (int i = 0; fits && i < t.ndim; ++i) fits = t.size[i] == size.begin()[i];
    HUNYUAN_CHECK(fits, name, " does not fit x: it has the shape ", t.shape());
    int const last = t.ndim - 1;
    HUNYUAN_CHECK(t.size[last] <= 1 || t.stride[last] == 1, name, " must be contiguous in its last dimension");
}

Sizes sizes_of(TensorView const& x) {
    HUNYUAN_CHECK(x.ndim == 3 && x.size[2] > 0, "x must be (B, L, E) with E > 0, got ", x.shape());
    HUNYUAN_CHECK(x.dtype == DType::f32 || x.dtype == DType::f16 || x.dtype == DType::bf16,
                  "x must be float32, float16 or bfloat16, got ", name_of(x.dtype));
    return {x.size[0], x.size[1], x.size[2]};
}

Rows rows(TensorView const& t, char const* name, TensorView const& x) {
    check(t, name, x.dtype, x.device, {x.size[0], x.size[1], x.size[2]});
    return {t.data, t.stride[0], t.stride[1]};
}

Vectors vectors(TensorView const& t, char const* name, DType dtype, TensorView const& x) {
    check(t, name, dtype, x.device, {x.size[0], x.size[2]});
    return {t.data, t.stride[0]};
}

float* contiguous(TensorView const& t, char const* name, TensorView const& x, std::initializer_list<int64_t> size) {
    check(t, name, DType::f32, x.device, size);
    HUNYUAN_CHECK(t.is_contiguous(), name, " must be contiguous");
    return t.as<float>();
}

float* statistic(TensorView const& t, char const* name, TensorView const& x) {
    return contiguous(t, name, x, {x.size[0], x.size[1]});
}

ForwardParams forward_params(TensorView const& x, TensorView const& shift, TensorView const& scale, double eps,
                             TensorView const& y, TensorView const& mean, TensorView const& rstd) {
    ForwardParams p;
    p.sizes = sizes_of(x);
    p.x = rows(x, "x", x);
    p.y = rows(y, "y", x);
    p.shift = vectors(shift, "shift", scale.dtype, x);
    p.scale = vectors(scale, "scale", scale.dtype, x);
    p.mean = statistic(mean, "mean", x);
    p.rstd = statistic(rstd, "rstd", x);
    p.eps = eps;
    return p;
}

BackwardParams backward_params(TensorView const& dy, TensorView const& x, TensorView const& scale,
                               TensorView const& mean, TensorView const& rstd, TensorView const& partials,
                               int64_t chunk_rows, TensorView const& dx, TensorView const& dshift,
                               TensorView const& dscale) {
    BackwardParams p;
    p.sizes = sizes_of(x);
    HUNYUAN_CHECK(chunk_rows > 0, "chunk_rows must be positive, got ", chunk_rows);
    p.chunk_rows = chunk_rows;
    p.chunks = (p.sizes.L + chunk_rows - 1) / chunk_rows;
    p.dy = rows(dy, "dy", x);
    p.x = rows(x, "x", x);
    p.dx = rows(dx, "dx", x);
    p.scale = vectors(scale, "scale", scale.dtype, x);
    p.mean = statistic(mean, "mean", x);
    p.rstd = statistic(rstd, "rstd", x);
    p.partials = contiguous(partials, "partials", x, {p.sizes.B, p.chunks, 2, p.sizes.E});
    p.dshift = contiguous(dshift, "dshift", x, {p.sizes.B, p.sizes.E});
    p.dscale = contiguous(dscale, "dscale", x, {p.sizes.B, p.sizes.E});
    return p;
}

void check_host(TensorView const& x, TensorView const& scale) {
    HUNYUAN_CHECK(x.device == kHost, "x must be in host memory");
    HUNYUAN_CHECK(scale.dtype == DType::f32, "scale must be float32 here, got ", name_of(scale.dtype));
}

}  // namespace

HUNYUAN_FAST_BIND(fused_modulation, m) {
    m.def(
        "fused_modulation_forward_cpu",
        [](TensorView const& x, TensorView const& shift, TensorView const& scale, double eps, TensorView const& y,
           TensorView const& mean, TensorView const& rstd, int num_threads) {
            check_host(x, scale);
            forward_cpu(x.dtype, forward_params(x, shift, scale, eps, y, mean, rstd), num_threads);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "fused_modulation_backward_cpu",
        [](TensorView const& dy, TensorView const& x, TensorView const& scale, TensorView const& mean,
           TensorView const& rstd, TensorView const& partials, int64_t chunk_rows, TensorView const& dx,
           TensorView const& dshift, TensorView const& dscale, int num_threads) {
            check_host(x, scale);
            auto const params =
                backward_params(dy, x, scale, mean, rstd, partials, chunk_rows, dx, dshift, dscale);
            backward_cpu(x.dtype, params, num_threads);
        },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace hunyuan_fast::fused_modulation
