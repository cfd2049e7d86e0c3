// What Python sees of the Hopper kernels: tensors are checked, turned into the structs of sm90.h, and handed on.
#ifdef HUNYUAN_FAST_CUDA

#include <cmath>
#include <limits>

#include "common/check.h"
#include "common/registry.h"
#include "common/tensor_caster.h"
#include "rope3d_attention/sm90_backward.h"
#include "rope3d_attention/sm90_layout.h"

namespace py = pybind11;

namespace hunyuan_fast::rope3d_attention {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 2 * kQueryRows;  // with room for the last tile

int narrowed(int64_t n) {
    HUNYUAN_CHECK(n > 0 && n <= kMost, "every size must be 1 to ", kMost, ", got ", n);
    return int(n);
}

void check_on_gpu(TensorView const& t, char const* name, TensorView const& k) {
    HUNYUAN_CHECK(t.device != kHost && t.device == k.device, name, " must be on a CUDA device, that of k");
}

// (B, L, N, D), L being `length`, with adjacent features, whose rows begin at multiples of 16 bytes; all else as k.
Rows rows_of(TensorView const& t, char const* name, TensorView const& k, int64_t length) {
    HUNYUAN_CHECK(t.dtype == k.dtype && (t.dtype == DType::bf16 || t.dtype == DType::f16), name,
                  " must be bfloat16 or float16, as k, got ", name_of(t.dtype));
    check_on_gpu(t, name, k);
    auto size = k.size;
    size[1] = length;
    HUNYUAN_CHECK(t.ndim == 4 && t.size == size, name, " must have the shape of k, ", k.shape(), ", with ", length,
                  " rows, got ", t.shape());
    bool aligned = t.stride[3] == 1 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
    for (int axis = 0; axis < 3; ++axis) {
        int64_t const stride = t.stride[axis];
        aligned = aligned && (t.size[axis] == 1 || (stride > 0 && stride % sm90::kChunkElements == 0));
    }
    HUNYUAN_CHECK(aligned, name, " must have adjacent features, each row at a multiple of 16 bytes");
    return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

Lengths lengths_of(TensorView const& t, char const* name, TensorView const& k) {
    if (!t.given()) return {};
    bool const fits = t.ndim == 1 && t.size[0] == k.size[0] && (t.dtype == DType::i32 || t.dtype == DType::i64);
    HUNYUAN_CHECK(fits, name, " must be (B,), int32 or int64, got ", t.shape(), " of ", name_of(t.dtype));
    check_on_gpu(t, name, k);
    return {t.as<int32_t>(), t.stride[0] * (t.dtype == DType::i64 ? 2 : 1)};
}

float const* lse_of(TensorView const& lse, TensorView const& q) {
    bool const fits = lse.ndim == 3 && lse.size[0] == q.size[0] && lse.size[1] == q.size[2] && lse.size[2] == q.size[1];
    HUNYUAN_CHECK(fits && lse.dtype == DType::f32 && lse.is_contiguous(), "lse must be (B, N, L), float32, got ",
                  lse.shape(), " of ", name_of(lse.dtype));
    check_on_gpu(lse, "lse", q);
    return lse.as<float>();
}

// Everything but the queries, of which there are as many as rows of out.
HopperParams params_of(TensorView const& k, TensorView const& v, TensorView const& kv_len, TensorView const& q_len,
                       double scale, TensorView const& out, TensorView const& lse, int key_tile, int cluster) {
    HUNYUAN_CHECK(k.ndim == 4 && out.ndim == 4, "k and out must have 4 dimensions, got ", k.shape(), " and ",
                  out.shape());
    HopperParams p;
    p.B = narrowed(k.size[0]), p.keys = narrowed(k.size[1]), p.N = narrowed(k.size[2]), p.D = narrowed(k.size[3]);
    p.L = q_len.given() ? narrowed(out.size[1]) : p.keys;
    HUNYUAN_CHECK(p.D == 64 || p.D == 128, "the head dimension must be 64 or 128, got ", p.D);
    HUNYUAN_CHECK(scale > 0, "scale must be positive, got ", scale);
    HUNYUAN_CHECK(key_tile == 128 || key_tile == 176, "key_tile must be 128 or 176, got ", key_tile);
    HUNYUAN_CHECK(cluster == 1 || cluster == 2, "cluster must be 1 or 2, got ", cluster);
    p.scale = float(scale), p.key_tile = key_tile, p.cluster = cluster;
    HUNYUAN_CHECK(items_of(p) <= kMost, "there may be ", kMost, " tiles of queries, got ", items_of(p));
    p.k = rows_of(k, "k", k, p.keys), p.v = rows_of(v, "v", k, p.keys), p.out = rows_of(out, "out", k, p.L);
    p.lengths = lengths_of(kv_len, "kv_len", k), p.queries = lengths_of(q_len, "q_len", k);
    p.lse = const_cast<float*>(lse_of(lse, out));
    return p;
}

void forward(TensorView const& q, TensorView const& k, TensorView const& v, TensorView const& kv_len, double scale,
             TensorView const& out, TensorView const& lse, int key_tile, int cluster, uintptr_t stream,
             TensorView const& q_len) {
    auto p = params_of(k, v, kv_len, q_len, scale, out, lse, key_tile, cluster);
    p.q = rows_of(q, "q", k, p.L);
    auto const run = k.dtype == DType::bf16 ? run_hopper_bf16 : run_hopper_f16;
    run(p, reinterpret_cast<void*>(stream));
}

float const* floats(TensorView const& t, char const* name, int64_t columns, TensorView const& k) {
    check_on_gpu(t, name, k);
    HUNYUAN_CHECK(t.dtype == DType::f32 && t.ndim > 0 && t.size[t.ndim - 1] == columns && t.stride[t.ndim - 1] == 1,
                  name, " must be float32 with ", columns, " adjacent values in its last dimension, got ", t.shape(),
                  " of ", name_of(t.dtype));
    return t.as<float>();
}

// One stream of packed projections, (B, rows, 3 N D), of which the first N D columns are queries.
RawRows raw_rows(TensorView const& t, char const* name, TensorView const& weight, HopperParams const& p,
                 TensorView const& k) {
    check_on_gpu(t, name, k);
    HUNYUAN_CHECK(t.dtype == k.dtype, name, " must have the dtype of k, got ", name_of(t.dtype));
    bool const fits = t.ndim == 3 && t.size[0] == p.B && t.size[2] == 3 * int64_t(p.N) * p.D && t.stride[2] == 1;
    HUNYUAN_CHECK(fits, name, " must be (B, rows, 3 N D) with adjacent columns, got ", t.shape());
    bool const aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride[0] % sm90::kChunkElements == 0 &&
                         t.stride[1] % sm90::kChunkElements == 0 && t.stride[1] >= 0 && t.stride[1] <= kMost;
    HUNYUAN_CHECK(aligned, name, " must have each row at a multiple of 16 bytes, rows not too far apart");
    return {t.data, t.stride[0], int(t.stride[1]), floats(weight, "a weight", p.D, k)};
}

void forward_raw(TensorView const& qkv, TensorView const& q_weight, TensorView const& cos, TensorView const& sin,
                 TensorView const& text_qkv, TensorView const& text_q_weight, double eps, TensorView const& k,
                 TensorView const& v, TensorView const& kv_len, double scale, TensorView const& out,
                 TensorView const& lse, int cluster, uintptr_t stream) {
    auto const p = params_of(k, v, kv_len, {}, scale, out, lse, 176, cluster);
    RawQueries raw;
    raw.stream[0] = raw.stream[1] = raw_rows(qkv, "qkv", q_weight, p, k);
    raw.second = int(qkv.size[1]), raw.eps = float(eps);
    int64_t length = qkv.size[1];
    if (text_qkv.given()) {
        raw.stream[1] = raw_rows(text_qkv, "text_qkv", text_q_weight, p, k);
        length += text_qkv.size[1];
    }
    HUNYUAN_CHECK(length == p.L, "k must have a row for each of qkv and text_qkv, ", length, ", got ", p.L);
    raw.cos = floats(cos, "cos", p.D, k), raw.sin = floats(sin, "sin", p.D, k);
    bool const tables = cos.ndim == 2 && sin.ndim == 2 && cos.size[0] == sin.size[0] && cos.size[0] <= qkv.size[1] &&
                        cos.stride[0] == sin.stride[0] && cos.stride[0] >= 0 &&
                        cos.size[0] * cos.stride[0] <= kMost;
    HUNYUAN_CHECK(tables, "cos and sin must be (rows, D) of the same strides, got ", cos.shape(), " and ", sin.shape());
    raw.rotated = int(cos.size[0]), raw.stride_table = int(cos.stride[0]);
    auto const run = k.dtype == DType::bf16 ? run_hopper_raw_bf16 : run_hopper_raw_f16;
    run(p, raw, reinterpret_cast<void*>(stream));
}

BackwardParams backward_sizes(TensorView const& q) {
    HUNYUAN_CHECK(q.ndim == 4, "q must have 4 dimensions, got ", q.shape());
    BackwardParams p;
    p.B = narrowed(q.size[0]), p.L = narrowed(q.size[1]), p.N = narrowed(q.size[2]), p.D = narrowed(q.size[3]);
    HUNYUAN_CHECK(p.D == 64 || p.D == 128, "the head dimension must be 64 or 128, got ", p.D);
    int64_t const tiles = int64_t(p.B) * p.N * ceil_div(p.L, backward_queries(p.D));
    HUNYUAN_CHECK(tiles <= kMost, "there may be ", kMost, " tiles of queries, got ", tiles);
    return p;
}

int64_t backward_workspace_size(TensorView const& q) { return backward_workspace_bytes(backward_sizes(q)); }

void backward(TensorView const& dout, TensorView const& out, TensorView const& lse, TensorView const& q,
              TensorView const& k, TensorView const& v, TensorView const& kv_len, double scale, TensorView const& dq,
              TensorView const& dk, TensorView const& dv, TensorView const& workspace, uintptr_t stream,
              TensorView const& q_len) {
    BackwardParams p = backward_sizes(q);
    HUNYUAN_CHECK(k.ndim == 4, "k must have 4 dimensions, got ", k.shape());
    p.keys = q_len.given() ? narrowed(k.size[1]) : p.L;
    p.scale = float(scale), p.score_scale = float(scale / std::log(2.0));
    p.q = rows_of(q, "q", k, p.L), p.k = rows_of(k, "k", k, p.keys), p.v = rows_of(v, "v", k, p.keys);
    p.out = rows_of(out, "out", k, p.L), p.dout = rows_of(dout, "dout", k, p.L), p.dq = rows_of(dq, "dq", k, p.L);
    p.dk = rows_of(dk, "dk", k, p.keys), p.dv = rows_of(dv, "dv", k, p.keys);
    p.lengths = lengths_of(kv_len, "kv_len", k), p.queries = lengths_of(q_len, "q_len", k), p.lse = lse_of(lse, q);
    int64_t const bytes = backward_workspace_bytes(p);
    bool const fits = workspace.dtype == DType::u8 && workspace.is_contiguous() && workspace.numel() >= bytes;
    HUNYUAN_CHECK(fits && reinterpret_cast<uintptr_t>(workspace.data) % 16 == 0, "workspace must be ", bytes,
                  " bytes at a multiple of 16, got ", workspace.shape(), " of ", name_of(workspace.dtype));
    check_on_gpu(workspace, "workspace", q);
    p.workspace = workspace.data;
    auto const run = q.dtype == DType::bf16 ? run_backward_bf16 : run_backward_f16;
    run(p, reinterpret_cast<void*>(stream));
}

}  // namespace

HUNYUAN_FAST_BIND(rope3d_attention_hopper, m) {
    using release_gil = py::call_guard<py::gil_scoped_release>;
    m.def("rope3d_attention_forward_hopper", &forward, release_gil());
    m.def("rope3d_attention_forward_raw_hopper", &forward_raw, release_gil());
    m.def("rope3d_attention_backward_workspace_hopper", &backward_workspace_size);
    m.def("rope3d_attention_backward_hopper", &backward, release_gil());
}

}  // namespace hunyuan_fast::rope3d_attention

#endif  // HUNYUAN_FAST_CUDA
