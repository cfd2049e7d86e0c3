// What Python sees: tensors are checked, turned into the structs of params.h, and handed to a launcher.
#include "common/check.h"
#include "common/registry.h"
#include "common/streaming.h"
#include "common/tensor_caster.h"
#include "group_norm_silu/cpu.h"

namespace hunyuan_fast::group_norm_silu {
namespace {

using Shape = std::initializer_list<int64_t>;

void check(TensorView const& t, char const* name, DType dtype, Shape size) {
    HUNYUAN_CHECK(t.device == kHost, name, " must be in host memory");
    HUNYUAN_CHECK(t.dtype == dtype, name, " must be ", name_of(dtype), ", got ", name_of(t.dtype));
    bool fits = t.ndim == static_cast<int>(size.size());
    for (int i = 0; fits && i < t.ndim; ++i) fits = t.size[i] == size.begin()[i];
    HUNYUAN_CHECK(fits, name, " does not fit x: it has the shape ", t.shape());
}

template <class T>
T* contiguous(TensorView const& t, char const* name, DType dtype, Shape size) {
    check(t, name, dtype, size);
    HUNYUAN_CHECK(t.is_contiguous(), name, " must be contiguous");
    return t.as<T>();
}

Sizes sizes_of(TensorView const& x, int64_t num_groups) {
    HUNYUAN_CHECK(x.ndim == 5 && x.numel() > 0, "x must be (B, T, H, W, C) with elements, got ", x.shape());
    HUNYUAN_CHECK(x.dtype == DType::f32 || x.dtype == DType::f16 || x.dtype == DType::bf16,
                  "x must be float32, float16 or bfloat16, got ", name_of(x.dtype));
    Sizes sizes;
    sizes.B = x.size[0], sizes.S = x.size[1] * x.size[2] * x.size[3], sizes.C = x.size[4], sizes.G = num_groups;
    HUNYUAN_CHECK(num_groups > 0 && sizes.C % num_groups == 0, "num_groups must divide C = ", sizes.C, ", got ",
                  num_groups);
    divide(sizes);
    return sizes;
}

// A tensor of the shape and dtype of x, every sample of which is contiguous.
Maps maps(TensorView const& t, char const* name, TensorView const& x) {
    check(t, name, x.dtype, {x.size[0], x.size[1], x.size[2], x.size[3], x.size[4]});
    TensorView sample = t;
    sample.size[0] = 1;
    HUNYUAN_CHECK(sample.is_contiguous(), name, " must have contiguous samples");
    return {t.data, t.stride[0]};
}

Norm norm_of(TensorView const& weight, TensorView const& bias, TensorView const& stats, double eps, bool silu,
             Sizes const& sizes) {
    return {contiguous<float>(weight, "weight", DType::f32, {sizes.C}),
            contiguous<float>(bias, "bias", DType::f32, {sizes.C}),
            contiguous<double>(stats, "stats", DType::f64, {3, sizes.B, sizes.G}), eps, silu};
}

// A new output: whether to write it past the caches.
bool streamed(TensorView const& fresh) {
    prefer_huge_pages(fresh);
    TensorView whole;  // where its samples start is looked at one by one
    whole.data = fresh.data, whole.dtype = fresh.dtype, whole.ndim = 1;
    whole.size[0] = fresh.numel(), whole.stride[0] = 1;
    return worth_streaming(whole);
}

void statistics_host(TensorView const& x, TensorView const& stats, int num_threads) {
    HUNYUAN_CHECK(stats.ndim == 3, "stats must be (3, B, G), got ", stats.shape());
    StatisticsParams p;
    p.sizes = sizes_of(x, stats.size[2]);
    p.x = maps(x, "x", x);
    double* const out = contiguous<double>(stats, "stats", DType::f64, {3, p.sizes.B, p.sizes.G});
    statistics_cpu(x.dtype, p, out, num_threads);
}

// stats are written first if they are not given.
void forward_host(TensorView const& x, TensorView const& weight, TensorView const& bias, TensorView const& stats,
                  bool given, double eps, bool silu, TensorView const& y, int num_threads) {
    if (!given) statistics_host(x, stats, num_threads);
    HUNYUAN_CHECK(stats.ndim == 3, "stats must be (3, B, G), got ", stats.shape());
    ForwardParams p;
    p.sizes = sizes_of(x, stats.size[2]);
    p.x = maps(x, "x", x);
    p.y = maps(y, "y", x);
    p.streams = streamed(y);
    forward_cpu(x.dtype, norm_of(weight, bias, stats, eps, silu, p.sizes), p, num_threads);
}

void backward_host(TensorView const& dy, TensorView const& x, TensorView const& weight, TensorView const& bias,
                   TensorView const& stats, double eps, bool silu, TensorView const& dx,
                   TensorView const& dweight, TensorView const& dbias, int num_threads) {
    HUNYUAN_CHECK(stats.ndim == 3, "stats must be (3, B, G), got ", stats.shape());
    BackwardParams p;
    p.sizes = sizes_of(x, stats.size[2]);
    p.dy = maps(dy, "dy", x);
    p.x = maps(x, "x", x);
    p.dx = maps(dx, "dx", x);
    p.streams = streamed(dx);
    float* const weights = contiguous<float>(dweight, "dweight", DType::f32, {p.sizes.C});
    float* const biases = contiguous<float>(dbias, "dbias", DType::f32, {p.sizes.C});
    backward_cpu(x.dtype, norm_of(weight, bias, stats, eps, silu, p.sizes), p, weights, biases, num_threads);
}

}  // namespace

HUNYUAN_FAST_BIND(group_norm_silu, m) {
    using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("group_norm_silu_statistics_cpu", &statistics_host, release_gil());
    m.def("group_norm_silu_forward_cpu", &forward_host, release_gil());
    m.def("group_norm_silu_backward_cpu", &backward_host, release_gil());
}

}  // namespace hunyuan_fast::group_norm_silu
