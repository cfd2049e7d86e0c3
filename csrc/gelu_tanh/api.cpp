// What Python sees: tensors are checked, turned into the structs of params.h, and handed to a launcher.
#include <initializer_list>

#include "common/check.h"
#include "common/registry.h"
#include "common/streaming.h"
#include "common/tensor_caster.h"
#include "gelu_tanh/cpu.h"

namespace py = pybind11;

namespace hunyuan_fast::gelu_tanh {
namespace {

void check(TensorView const& t, char const* name, TensorView const& x) {
    HUNYUAN_CHECK(t.device == kHost, name, " must be in host memory");
    HUNYUAN_CHECK(t.dtype == x.dtype, name, " must be ", name_of(x.dtype), ", got ", name_of(t.dtype));
    int const last = t.ndim - 1;
    bool fits = t.ndim == x.ndim;
    for (int i = 0; fits && i < last; ++i) fits = t.size[i] == x.size[i];
    HUNYUAN_CHECK(fits, name, " does not fit x: it has the shape ", t.shape());
    HUNYUAN_CHECK(t.size[last] <= 1 || t.stride[last] == 1, name, " must be contiguous in its last dimension");
}

void check_width(TensorView const& t, char const* name, int64_t width) {
    HUNYUAN_CHECK(t.size[t.ndim - 1] == width, name, " must have rows of ", width, ", got the shape ", t.shape());
}

void check_x(TensorView const& x) {
    HUNYUAN_CHECK(x.ndim >= 1 && x.numel() > 0, "x must have elements, got ", x.shape());
    HUNYUAN_CHECK(x.dtype == DType::f32 || x.dtype == DType::f16 || x.dtype == DType::bf16,
                  "x must be float32, float16 or bfloat16, got ", name_of(x.dtype));
    check(x, "x", x);
}

struct Side {
    TensorView const& tensor;
    Rows& rows;
};

// The outer dimensions of tensors of one shape: those of one element dropped, neighbours that every tensor
// steps through as one joined.
Grid grid_of(std::initializer_list<Side> sides) {
    TensorView const& first = sides.begin()->tensor;
    Grid grid;
    grid.width = first.size[first.ndim - 1];
    for (int d = 0; d < first.ndim - 1; ++d) {
        if (first.size[d] == 1) continue;
        int const last = grid.outer - 1;
        bool joined = last >= 0;
        for (Side const& s : sides) {
            joined = joined && s.rows.stride[last] == s.tensor.stride[d] * first.size[d];
        }
        int const at = joined ? last : grid.outer++;
        grid.size[at] = joined ? grid.size[at] * first.size[d] : first.size[d];
        for (Side const& s : sides) s.rows.stride[at] = s.tensor.stride[d];
        grid.rows *= first.size[d];
    }
    return grid;
}

// The same, and rows that follow each other in every tensor are one long row.
Grid flat_grid_of(std::initializer_list<Side> sides) {
    Grid grid = grid_of(sides);
    bool joined = grid.outer == 1;
    for (Side const& s : sides) joined = joined && s.rows.stride[0] == grid.width;
    if (!joined) return grid;
    Grid flat;
    flat.width = grid.rows * grid.width;
    return flat;
}

// A new output: whether to write it past the caches.
bool streamed(TensorView const& fresh) {
    prefer_huge_pages(fresh);
    return worth_streaming(fresh);
}

void forward_host(TensorView const& x, TensorView const& y, bool y_is_fresh, int num_threads) {
    check_x(x);
    check(y, "y", x);
    check_width(y, "y", x.size[x.ndim - 1]);
    ForwardParams p;
    p.streams = y_is_fresh && streamed(y);
    p.x.data = x.data;
    p.y.data = y.data;
    p.grid = flat_grid_of({{x, p.x}, {y, p.y}});
    forward_cpu(x.dtype, p, num_threads);
}

void concat_host(TensorView const& left, TensorView const& x, TensorView const& y, int num_threads) {
    check_x(x);
    check(left, "left", x);
    check(y, "y", x);
    int64_t const width = left.size[left.ndim - 1];
    check_width(y, "y", width + x.size[x.ndim - 1]);
    ForwardParams p;
    p.streams = streamed(y);
    p.x.data = x.data;
    p.y.data = y.as<char>() + width * element_size(x.dtype);
    p.grid = grid_of({{x, p.x}, {y, p.y}});
    CopyParams c;
    c.element_size = element_size(x.dtype);
    c.from.data = left.data;
    c.to.data = y.data;
    c.grid = grid_of({{left, c.from}, {y, c.to}});
    concat_cpu(x.dtype, c, p, num_threads);
}

void backward_host(TensorView const& dy, TensorView const& x, TensorView const& dx, int num_threads) {
    check_x(x);
    for (auto const& [t, name] : {std::pair{dy, "dy"}, std::pair{dx, "dx"}}) {
        check(t, name, x);
        check_width(t, name, x.size[x.ndim - 1]);
    }
    BackwardParams p;
    p.streams = streamed(dx);
    p.dy.data = dy.data;
    p.x.data = x.data;
    p.dx.data = dx.data;
    p.grid = flat_grid_of({{dy, p.dy}, {x, p.x}, {dx, p.dx}});
    backward_cpu(x.dtype, p, num_threads);
}

}  // namespace

HUNYUAN_FAST_BIND(gelu_tanh, m) {
    using release_gil = py::call_guard<py::gil_scoped_release>;
    m.def("gelu_tanh_forward_cpu", &forward_host, release_gil());
    m.def("gelu_tanh_concat_cpu", &concat_host, release_gil());
    m.def("gelu_tanh_backward_cpu", &backward_host, release_gil());
}

}  // namespace hunyuan_fast::gelu_tanh
