// What Python sees: tensors are checked, turned into the structs of params.h, and handed to the launcher.
#include <initializer_list>
#include <vector>

#include <pybind11/stl.h>

#include "common/check.h"
#include "common/registry.h"
#include "common/streaming.h"
#include "common/tensor_caster.h"
#include "sliding_tile_attention/cpu.h"

namespace py = pybind11;

namespace hunyuan_fast::sliding_tile_attention {
namespace {

using rope3d_attention::Heads;
using rope3d_attention::Sizes;

void check(TensorView const& t, char const* name, DType dtype, std::initializer_list<int64_t> size) {
    HUNYUAN_CHECK(t.device == kHost, name, " must be in host memory");
    HUNYUAN_CHECK(t.dtype == dtype, name, " must be ", name_of(dtype), ", got ", name_of(t.dtype));
    bool fits = t.ndim == static_cast<int>(size.size());
    for (int i = 0; fits && i < t.ndim; ++i) fits = t.size[i] == size.begin()[i];
    HUNYUAN_CHECK(fits, name, " does not fit the other tensors: it has the shape ", t.shape());
}

Heads heads(TensorView const& t, char const* name, DType dtype, Sizes const& sizes) {
    check(t, name, dtype, {sizes.B, sizes.L, sizes.N, sizes.D});
    HUNYUAN_CHECK(t.size[3] <= 1 || t.stride[3] == 1, name, " must be contiguous in its last dimension");
    return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

// Valid tokens of each sample; all of them where no lengths are given.
std::vector<int64_t> lengths_of(TensorView const& kv_len, Sizes const& sizes) {
    std::vector<int64_t> lengths(size_t(sizes.B), sizes.L);
    if (!kv_len.given()) return lengths;
    HUNYUAN_CHECK(kv_len.dtype == DType::i32 || kv_len.dtype == DType::i64, "kv_len must be int32 or int64, got ",
                  name_of(kv_len.dtype));
    check(kv_len, "kv_len", kv_len.dtype, {sizes.B});
    for (int64_t b = 0; b < sizes.B; ++b) {
        int64_t const at = b * kv_len.stride[0];
        int64_t const length = kv_len.dtype == DType::i32 ? kv_len.as<int32_t>()[at] : kv_len.as<int64_t>()[at];
        HUNYUAN_CHECK(length >= 0 && length <= sizes.L, "kv_len must lie in [0, L] = [0, ", sizes.L, "], got ", length);
        lengths[size_t(b)] = length;
    }
    return lengths;
}

std::vector<Sizes3> windows_of(TensorView const& windows, Sizes const& sizes) {
    check(windows, "windows", DType::i32, {sizes.N, 3});
    std::vector<Sizes3> found(static_cast<size_t>(sizes.N));
    for (int64_t n = 0; n < sizes.N; ++n) {
        for (int axis = 0; axis < 3; ++axis) {
            found[size_t(n)][size_t(axis)] = windows.as<int32_t>()[n * windows.stride[0] + axis * windows.stride[1]];
        }
    }
    return found;
}

Sizes sizes_of(TensorView const& q, Sizes3 const& grid, Sizes3 const& tile) {
    HUNYUAN_CHECK(q.ndim == 4 && q.numel() > 0, "q must be (B, L, N, D), not empty, got ", q.shape());
    HUNYUAN_CHECK(q.dtype == DType::f32 || q.dtype == DType::f16 || q.dtype == DType::bf16,
                  "q must be float32, float16 or bfloat16, got ", name_of(q.dtype));
    for (int axis = 0; axis < 3; ++axis) {
        HUNYUAN_CHECK(grid[axis] > 0 && tile[axis] > 0, "grid and tile must be positive along every axis");
    }
    HUNYUAN_CHECK(grid[0] * grid[1] * grid[2] <= q.size[1], "grid must have at most L = ", q.size[1], " tokens");
    return {q.size[0], q.size[1], q.size[2], q.size[3]};
}

// Joint tokens: keys are those of the queries.
void fill(Inputs& p, Sizes const& sizes, TensorView const& q, TensorView const& k, TensorView const& v,
          std::vector<int64_t> const& lengths, double scale) {
    p.sizes = sizes;
    p.keys = sizes.L;
    p.scale = float(scale);
    p.lengths = p.queries = lengths.data();
    p.q = heads(q, "q", q.dtype, sizes);
    p.k = heads(k, "k", q.dtype, sizes);
    p.v = heads(v, "v", q.dtype, sizes);
}

float* sums(TensorView const& lse, Sizes const& sizes) {
    check(lse, "lse", DType::f32, {sizes.B, sizes.N, sizes.L});
    HUNYUAN_CHECK(lse.is_contiguous(), "lse must be contiguous");
    return lse.as<float>();
}

void forward_host(TensorView const& q, TensorView const& k, TensorView const& v, TensorView const& windows,
                  Sizes3 const& grid, Sizes3 const& tile, TensorView const& kv_len, double scale,
                  TensorView const& out, TensorView const& lse, int num_threads) {
    auto const sizes = sizes_of(q, grid, tile);
    auto const lengths = lengths_of(kv_len, sizes);
    ForwardParams p;
    fill(p, sizes, q, k, v, lengths, scale);
    p.out = heads(out, "out", q.dtype, sizes);
    p.lse = sums(lse, sizes);
    forward_cpu(q.dtype, p, grid, tile, windows_of(windows, sizes), num_threads);
}

void backward_host(TensorView const& dout, TensorView const& out, TensorView const& lse, TensorView const& q,
                   TensorView const& k, TensorView const& v, TensorView const& windows, Sizes3 const& grid,
                   Sizes3 const& tile, TensorView const& kv_len, double scale, TensorView const& dq,
                   TensorView const& dk, TensorView const& dv, int num_threads) {
    auto const sizes = sizes_of(q, grid, tile);
    auto const lengths = lengths_of(kv_len, sizes);
    BackwardParams p;
    fill(p, sizes, q, k, v, lengths, scale);
    p.dout = heads(dout, "dout", q.dtype, sizes);
    p.out = heads(out, "out", q.dtype, sizes);
    p.lse = sums(lse, sizes);
    p.dq = heads(dq, "dq", q.dtype, sizes);
    p.dk = heads(dk, "dk", q.dtype, sizes);
    p.dv = heads(dv, "dv", q.dtype, sizes);
    for (TensorView const* each : {&dq, &dk, &dv}) prefer_huge_pages(*each);
    backward_cpu(q.dtype, p, grid, tile, windows_of(windows, sizes), num_threads);
}

// Bytes beside tensors that backward has while it runs.
int64_t bytes_host(TensorView const& q, TensorView const& windows, Sizes3 const& grid, Sizes3 const& tile,
                   TensorView const& kv_len, int num_threads) {
    auto const sizes = sizes_of(q, grid, tile);
    auto const lengths = lengths_of(kv_len, sizes);
    Inputs p;
    p.sizes = sizes;
    p.lengths = lengths.data();
    return backward_bytes(q.dtype, p, grid, tile, windows_of(windows, sizes), num_threads);
}

}  // namespace

HUNYUAN_FAST_BIND(sliding_tile_attention, m) {
    using release_gil = py::call_guard<py::gil_scoped_release>;
    m.def("sliding_tile_attention_forward_cpu", &forward_host, release_gil());
    m.def("sliding_tile_attention_backward_cpu", &backward_host, release_gil());
    m.def("sliding_tile_attention_bytes_cpu", &bytes_host);
}

}  // namespace hunyuan_fast::sliding_tile_attention
