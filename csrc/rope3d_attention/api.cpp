// What Python sees: tensors are checked, turned into the structs of params.h, and handed to a launcher.
#include <initializer_list>
#include <vector>

#include "common/check.h"
#include "common/registry.h"
#include "common/streaming.h"
#include "common/tensor_caster.h"
#include "rope3d_attention/cpu.h"

namespace py = pybind11;

namespace hunyuan_fast::rope3d_attention {
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

Sizes sizes_of(TensorView const& q) {
    HUNYUAN_CHECK(q.ndim == 4 && q.numel() > 0, "q must be (B, L, N, D), not empty, got ", q.shape());
    HUNYUAN_CHECK(q.dtype == DType::f32 || q.dtype == DType::f16 || q.dtype == DType::bf16,
                  "q must be float32, float16 or bfloat16, got ", name_of(q.dtype));
    return {q.size[0], q.size[1], q.size[2], q.size[3]};
}

Heads heads(TensorView const& t, char const* name, DType dtype, Sizes const& sizes) {
    check(t, name, dtype, {sizes.B, sizes.L, sizes.N, sizes.D});
    return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

float* sums(TensorView const& t, Sizes const& sizes) {
    check(t, "lse", DType::f32, {sizes.B, sizes.N, sizes.L});
    HUNYUAN_CHECK(t.is_contiguous(), "lse must be contiguous");
    return t.as<float>();
}

// Valid tokens of each of B samples; all L of them where no numbers are given.
std::vector<int64_t> lengths_of(TensorView const& given, char const* name, int64_t B, int64_t L) {
    std::vector<int64_t> lengths(size_t(B), L);
    if (!given.given()) return lengths;
    HUNYUAN_CHECK(given.dtype == DType::i32 || given.dtype == DType::i64, name, " must be int32 or int64, got ",
                  name_of(given.dtype));
    HUNYUAN_CHECK(given.device == kHost && given.ndim == 1 && given.size[0] == B, name,
                  " must be (B,) in host memory, got ", given.shape());
    for (int64_t b = 0; b < B; ++b) {
        int64_t const at = b * given.stride[0];
        int64_t const length = given.dtype == DType::i32 ? given.as<int32_t>()[at] : given.as<int64_t>()[at];
        HUNYUAN_CHECK(length >= 0 && length <= L, name, " must lie in [0, L] = [0, ", L, "], got ", length);
        lengths[size_t(b)] = length;
    }
    return lengths;
}

// Valid keys and queries of each sample; where there are none of one, none of the other.
struct Lengths {
    std::vector<int64_t> keys;
    std::vector<int64_t> own;  // queries, where those are not the tokens of the keys

    Lengths(TensorView const& kv_len, TensorView const& q_len, Sizes const& sizes, int64_t num_keys)
        : keys(lengths_of(kv_len, "kv_len", sizes.B, num_keys)) {
        if (!q_len.given()) return;
        own = lengths_of(q_len, "q_len", sizes.B, sizes.L);
        for (size_t b = 0; b < own.size(); ++b) {
            if (own[b] == 0 || keys[b] == 0) own[b] = keys[b] = 0;
        }
    }
    int64_t const* queries() const { return own.empty() ? keys.data() : own.data(); }
};

int64_t keys_of(TensorView const& k, TensorView const& q_len, Sizes const& sizes) {
    return q_len.given() && k.ndim == 4 ? k.size[1] : sizes.L;
}

void fill(Inputs& p, Sizes const& sizes, int64_t keys, TensorView const& q, TensorView const& k, TensorView const& v,
          Lengths const& lengths, double scale) {
    p.sizes = sizes;
    p.keys = keys;
    p.scale = float(scale);
    p.lengths = lengths.keys.data();
    p.queries = lengths.queries();
    p.q = heads(q, "q", q.dtype, sizes);
    p.k = heads(k, "k", q.dtype, p.key_sizes());
    p.v = heads(v, "v", q.dtype, p.key_sizes());
}

void forward_host(TensorView const& q, TensorView const& k, TensorView const& v, TensorView const& kv_len,
                  TensorView const& q_len, double scale, TensorView const& out, TensorView const& lse,
                  int num_threads) {
    auto const sizes = sizes_of(q);
    int64_t const keys = keys_of(k, q_len, sizes);
    Lengths const lengths(kv_len, q_len, sizes, keys);
    ForwardParams p;
    fill(p, sizes, keys, q, k, v, lengths, scale);
    p.out = heads(out, "out", q.dtype, sizes);
    p.lse = sums(lse, sizes);
    prefer_huge_pages(out);
    forward_cpu(q.dtype, p, num_threads);
}

void backward_host(TensorView const& dout, TensorView const& out, TensorView const& lse, TensorView const& q,
                   TensorView const& k, TensorView const& v, TensorView const& kv_len, TensorView const& q_len,
                   double scale, TensorView const& dq, TensorView const& dk, TensorView const& dv, int num_threads) {
    auto const sizes = sizes_of(q);
    int64_t const keys = keys_of(k, q_len, sizes);
    Lengths const lengths(kv_len, q_len, sizes, keys);
    BackwardParams p;
    fill(p, sizes, keys, q, k, v, lengths, scale);
    p.dout = heads(dout, "dout", q.dtype, sizes);
    p.out = heads(out, "out", q.dtype, sizes);
    p.lse = sums(lse, sizes);
    p.dq = heads(dq, "dq", q.dtype, sizes);
    p.dk = heads(dk, "dk", q.dtype, p.key_sizes());
    p.dv = heads(dv, "dv", q.dtype, p.key_sizes());
    for (TensorView const* each : {&dq, &dk, &dv}) prefer_huge_pages(*each);
    backward_cpu(q.dtype, p, num_threads);
}

}  // namespace

HUNYUAN_FAST_BIND(rope3d_attention, m) {
    using release_gil = py::call_guard<py::gil_scoped_release>;
    m.def("rope3d_attention_forward_cpu", &forward_host, release_gil());
    m.def("rope3d_attention_backward_cpu", &backward_host, release_gil());
}

}  // namespace hunyuan_fast::rope3d_attention
