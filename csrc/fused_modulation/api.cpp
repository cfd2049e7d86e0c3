// What Python sees: tensors are checked, turned into the structs of params.h, and handed to a launcher.
#include "common/check.h"
#include "common/registry.h"
#include "common/tensor_caster.h"
#include "fused_modulation/cpu.h"
#ifdef HUNYUAN_FAST_CUDA
#include "fused_modulation/cuda.h"
#endif

namespace py = pybind11;

namespace hunyuan_fast::fused_modulation {
namespace {

using Shape = std::initializer_list<int64_t>;

void check(TensorView const& t, char const* name, DType dtype, int device, Shape size) {
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

float* contiguous(TensorView const& t, char const* name, TensorView const& x, Shape size) {
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

void forward_host(TensorView const& x, TensorView const& shift, TensorView const& scale, double eps,
                  TensorView const& y, TensorView const& mean, TensorView const& rstd, int num_threads) {
    check_host(x, scale);
    forward_cpu(x.dtype, forward_params(x, shift, scale, eps, y, mean, rstd), num_threads);
}

void backward_host(TensorView const& dy, TensorView const& x, TensorView const& scale, TensorView const& mean,
                   TensorView const& rstd, TensorView const& partials, int64_t chunk_rows, TensorView const& dx,
                   TensorView const& dshift, TensorView const& dscale, int num_threads) {
    check_host(x, scale);
    auto const params = backward_params(dy, x, scale, mean, rstd, partials, chunk_rows, dx, dshift, dscale);
    backward_cpu(x.dtype, params, num_threads);
}

#ifdef HUNYUAN_FAST_CUDA
Modulation modulation_of(TensorView const& x, TensorView const& scale) {
    HUNYUAN_CHECK(x.device != kHost, "x must be on a CUDA device");
    HUNYUAN_CHECK(scale.dtype == x.dtype || scale.dtype == DType::f32,
                  "scale must be float32 or of the dtype of x, got ", name_of(scale.dtype));
    return scale.dtype == DType::f32 ? Modulation::f32 : Modulation::as_x;
}

void forward_cuda(TensorView const& x, TensorView const& shift, TensorView const& scale, double eps,
                  TensorView const& y, TensorView const& mean, TensorView const& rstd, int threads, int vectors,
                  uintptr_t stream) {
    auto const params = forward_params(x, shift, scale, eps, y, mean, rstd);
    auto const launcher =
        x.dtype == DType::f32 ? forward_f32 : x.dtype == DType::f16 ? forward_f16 : forward_bf16;
    launcher(params, modulation_of(x, scale), {threads, vectors, reinterpret_cast<void*>(stream)});
}

void backward_cuda(TensorView const& dy, TensorView const& x, TensorView const& scale, TensorView const& mean,
                   TensorView const& rstd, TensorView const& partials, int64_t chunk_rows, TensorView const& dx,
                   TensorView const& dshift, TensorView const& dscale, int threads, int vectors,
                   uintptr_t stream) {
    auto const params = backward_params(dy, x, scale, mean, rstd, partials, chunk_rows, dx, dshift, dscale);
    auto const launcher =
        x.dtype == DType::f32 ? backward_f32 : x.dtype == DType::f16 ? backward_f16 : backward_bf16;
    launcher(params, modulation_of(x, scale), {threads, vectors, reinterpret_cast<void*>(stream)});
}
#endif

}  // namespace

HUNYUAN_FAST_BIND(fused_modulation, m) {
    using release_gil = py::call_guard<py::gil_scoped_release>;
    m.def("fused_modulation_forward_cpu", &forward_host, release_gil());
    m.def("fused_modulation_backward_cpu", &backward_host, release_gil());
#ifdef HUNYUAN_FAST_CUDA
    m.def("fused_modulation_forward_cuda", &forward_cuda, release_gil());
    m.def("fused_modulation_backward_cuda", &backward_cuda, release_gil());
#endif
}

}  // namespace hunyuan_fast::fused_modulation
