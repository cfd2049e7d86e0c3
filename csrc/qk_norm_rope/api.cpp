// What Python sees: tensors are checked, turned into the structs of params.h, and handed to a launcher.
#include <initializer_list>

#include "common/check.h"
#include "common/registry.h"
#include "common/streaming.h"
#include "common/tensor_caster.h"
#include "qk_norm_rope/cpu.h"

namespace py = pybind11;

namespace hunyuan_fast::qk_norm_rope {
namespace {

using Shape = std::initializer_list<int64_t>;

void check(TensorView const& t, char const* name, DType dtype, Shape size) {
    HUNYUAN_CHECK(t.device == kHost, name, " must be in host memory");
    HUNYUAN_CHECK(t.dtype == dtype, name, " must be ", name_of(dtype), ", got ", name_of(t.dtype));
    bool fits = t.ndim == static_cast<int>(size.size());
    for (int i = 0; fits && i < t.ndim; ++i) fits = t.size[i] == size.begin()[i];
    HUNYUAN_CHECK(fits, name, " does not fit the other tensors: it has the shape ", t.shape());
    int const last = t.ndim - 1;
    HUNYUAN_CHECK(t.size[last] <= 1 || t.stride[last] == 1, name, " must be contiguous in its last dimension");
}

// `heads` is any tensor (B, L, N, D) of the call.
Sizes sizes_of(TensorView const& heads, TensorView const& cos) {
    HUNYUAN_CHECK(heads.ndim == 4 && heads.numel() > 0, "heads must be (B, L, N, D), not empty, got ", heads.shape());
    HUNYUAN_CHECK(heads.dtype == DType::f32 || heads.dtype == DType::f16 || heads.dtype == DType::bf16,
                  "heads must be float32, float16 or bfloat16, got ", name_of(heads.dtype));
    HUNYUAN_CHECK(cos.ndim == 2, "cos must be (L_video, D), got ", cos.shape());
    Sizes const sizes{heads.size[0], heads.size[1], heads.size[2], heads.size[3], cos.size[0]};
    HUNYUAN_CHECK(sizes.D % 2 == 0 && sizes.D <= kMaxD, "D must be even and at most ", kMaxD, ", got ", sizes.D);
    return sizes;
}

Packed packed(TensorView const& t, char const* name, DType dtype, Sizes const& sizes, int64_t rows) {
    check(t, name, dtype, {sizes.B, rows, 3 * sizes.N * sizes.D});
    return {t.data, t.stride[0], t.stride[1]};
}

Heads heads(TensorView const& t, char const* name, DType dtype, Sizes const& sizes) {
    check(t, name, dtype, {sizes.B, sizes.L, sizes.N, sizes.D});
    return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

Table table(TensorView const& t, char const* name, Sizes const& sizes) {
    check(t, name, DType::f32, {sizes.L_video, sizes.D});
    return {t.as<float>(), t.stride[0]};
}

float const* weight(TensorView const& t, char const* name, Sizes const& sizes) {
    check(t, name, DType::f32, {sizes.D});
    return t.as<float>();
}

float* contiguous(TensorView const& t, char const* name, Shape size) {
    check(t, name, DType::f32, size);
    HUNYUAN_CHECK(t.is_contiguous(), name, " must be contiguous");
    return t.as<float>();
}

// A new output, of which a head is written at a time: whether to write it past the caches.
bool streamed(TensorView const& out, Sizes const& sizes) {
    prefer_huge_pages(out);
    return sizes.D * element_size(out.dtype) % kStreamAlignment == 0 && worth_streaming(out);
}

// Everything that forward and backward have in common.
void fill(Inputs& p, DType dtype, Sizes const& sizes, TensorView const& qkv, TensorView const& q_weight,
          TensorView const& k_weight, TensorView const& cos, TensorView const& sin, TensorView const& text_qkv,
          TensorView const& text_q_weight, TensorView const& text_k_weight, double eps) {
    HUNYUAN_CHECK(qkv.ndim == 3 && qkv.size[1] <= sizes.L, "qkv must be (B, L, 3ND), got ", qkv.shape());
    int64_t const length = qkv.size[1];
    p.sizes = sizes;
    p.cos = table(cos, "cos", sizes);
    p.sin = table(sin, "sin", sizes);
    p.eps = eps;
    p.streams = text_qkv.given() ? 2 : 1;
    p.stream[0].qkv = packed(qkv, "qkv", dtype, sizes, text_qkv.given() ? length : sizes.L);
    p.stream[0].weights[0] = weight(q_weight, "q_weight", sizes);
    p.stream[0].weights[1] = weight(k_weight, "k_weight", sizes);
    HUNYUAN_CHECK(sizes.L_video <= length, "cos has more rows than qkv: ", sizes.L_video, " and ", length);
    if (!text_qkv.given()) return;
    HUNYUAN_CHECK(text_q_weight.given() && text_k_weight.given(), "text_qkv comes without its weights");
    p.stream[1].first = length;
    p.stream[1].qkv = packed(text_qkv, "text_qkv", dtype, sizes, sizes.L - length);
    p.stream[1].weights[0] = weight(text_q_weight, "text_q_weight", sizes);
    p.stream[1].weights[1] = weight(text_k_weight, "text_k_weight", sizes);
}

void forward_host(TensorView const& qkv, TensorView const& q_weight, TensorView const& k_weight,
                  TensorView const& cos, TensorView const& sin, TensorView const& text_qkv,
                  TensorView const& text_q_weight, TensorView const& text_k_weight, double eps, TensorView const& q,
                  TensorView const& k, TensorView const& v, int num_threads) {
    ForwardParams p;
    auto const sizes = sizes_of(k, cos);
    fill(p, k.dtype, sizes, qkv, q_weight, k_weight, cos, sin, text_qkv, text_q_weight, text_k_weight, eps);
    if (q.given()) p.out[0] = heads(q, "q", k.dtype, sizes);
    p.out[1] = heads(k, "k", k.dtype, sizes);
    p.out[2] = heads(v, "v", k.dtype, sizes);
    p.streams = streamed(k, sizes);
    for (TensorView const* each : {&q, &v}) {
        if (each->given()) p.streams = streamed(*each, sizes) && p.streams;
    }
    forward_cpu(k.dtype, p, num_threads);
}

void backward_host(TensorView const& dq, TensorView const& dk, TensorView const& dv, TensorView const& qkv,
                   TensorView const& q_weight, TensorView const& k_weight, TensorView const& cos,
                   TensorView const& sin, TensorView const& text_qkv, TensorView const& text_q_weight,
                   TensorView const& text_k_weight, double eps, TensorView const& partials, int64_t chunk_rows,
                   TensorView const& dqkv, TensorView const& dtext_qkv, TensorView const& dweights,
                   int num_threads) {
    BackwardParams p;
    auto const sizes = sizes_of(dq, cos);
    fill(p, dq.dtype, sizes, qkv, q_weight, k_weight, cos, sin, text_qkv, text_q_weight, text_k_weight, eps);
    p.gradient[0] = heads(dq, "dq", dq.dtype, sizes);
    p.gradient[1] = heads(dk, "dk", dq.dtype, sizes);
    p.gradient[2] = heads(dv, "dv", dq.dtype, sizes);
    p.stream[0].dqkv = packed(dqkv, "dqkv", dq.dtype, sizes, qkv.size[1]);
    p.stream[0].streams = streamed(dqkv, sizes);
    if (text_qkv.given()) {
        HUNYUAN_CHECK(dtext_qkv.given(), "dtext_qkv is missing");
        p.stream[1].dqkv = packed(dtext_qkv, "dtext_qkv", dq.dtype, sizes, text_qkv.size[1]);
        p.stream[1].streams = streamed(dtext_qkv, sizes);
    }
    HUNYUAN_CHECK(chunk_rows > 0, "chunk_rows must be positive, got ", chunk_rows);
    p.chunk_rows = chunk_rows;
    p.chunks = (sizes.B * sizes.L + chunk_rows - 1) / chunk_rows;
    p.partials = contiguous(partials, "partials", {p.chunks, 2 * p.streams, sizes.D});
    p.dweights = contiguous(dweights, "dweights", {2 * p.streams, sizes.D});
    backward_cpu(dq.dtype, p, num_threads);
}

}  // namespace

HUNYUAN_FAST_BIND(qk_norm_rope, m) {
    using release_gil = py::call_guard<py::gil_scoped_release>;
    m.def("qk_norm_rope_forward_cpu", &forward_host, release_gil());
    m.def("qk_norm_rope_backward_cpu", &backward_host, release_gil());
}

}  // namespace hunyuan_fast::qk_norm_rope
