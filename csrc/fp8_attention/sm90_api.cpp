// What Python sees of the Hopper kernel: tensors are checked, turned into the structs of sm90.h, and handed on.
#ifdef HUNYUAN_FAST_CUDA

#include <initializer_list>
#include <limits>

#include "common/check.h"
#include "common/registry.h"
#include "common/tensor_caster.h"
#include "fp8_attention/sm90_layout.h"

namespace py = pybind11;

namespace hunyuan_fast::fp8_attention {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 2 * kQueryRows;  // with room for the last tile

int narrowed(int64_t n) {
    HUNYUAN_CHECK(n > 0 && n <= kMost, "every size must be 1 to ", kMost, ", got ", n);
    return int(n);
}

void check_on_gpu(TensorView const& t, char const* name, TensorView const& out) {
    HUNYUAN_CHECK(t.device != kHost && t.device == out.device, name, " must be on a CUDA device, that of out");
}

// Contiguous and of this dtype and shape, at a multiple of 16 bytes.
void* data_of(TensorView const& t, char const* name, DType dtype, std::initializer_list<int64_t> shape,
              TensorView const& out) {
    check_on_gpu(t, name, out);
    bool fits = t.dtype == dtype && t.ndim == int(shape.size()) && t.is_contiguous();
    int axis = 0;
    for (int64_t const size : shape) fits = fits && t.size[axis++] == size;
    HUNYUAN_CHECK(fits && reinterpret_cast<uintptr_t>(t.data) % 16 == 0, name, " must be contiguous, of ",
                  name_of(dtype), ", and fit out, ", out.shape(), "; got ", t.shape(), " of ", name_of(t.dtype));
    return t.data;
}

void set_lengths(HopperParams& p, TensorView const& t, TensorView const& out) {
    if (!t.given()) return;
    bool const fits = t.ndim == 1 && t.size[0] == p.B && (t.dtype == DType::i32 || t.dtype == DType::i64);
    HUNYUAN_CHECK(fits, "kv_len must be (B,), int32 or int64, got ", t.shape(), " of ", name_of(t.dtype));
    check_on_gpu(t, "kv_len", out);
    p.lengths = t.as<int32_t>(), p.lengths_step = t.stride[0] * (t.dtype == DType::i64 ? 2 : 1);
}

void set_out(HopperParams& p, TensorView const& out) {
    HUNYUAN_CHECK(out.ndim == 4, "out must have 4 dimensions, got ", out.shape());
    HUNYUAN_CHECK(out.dtype == DType::bf16 || out.dtype == DType::f16 || out.dtype == DType::f32,
                  "out must be bfloat16, float16 or float32, got ", name_of(out.dtype));
    HUNYUAN_CHECK(out.device != kHost, "out must be on a CUDA device");
    HUNYUAN_CHECK(out.size[3] == kFeatures, "the head dimension must be ", kFeatures, ", got ", out.size[3]);
    bool aligned = out.stride[3] == 1 && reinterpret_cast<uintptr_t>(out.data) % (2 * element_size(out.dtype)) == 0;
    for (int axis = 0; axis < 3; ++axis) aligned = aligned && (out.size[axis] == 1 || out.stride[axis] % 2 == 0);
    HUNYUAN_CHECK(aligned, "out must have adjacent features, and rows that begin at pairs of them");
    p.B = narrowed(out.size[0]), p.L = narrowed(out.size[1]), p.N = narrowed(out.size[2]);
    p.Lp = ceil_div(p.L, kKeys) * kKeys;
    HUNYUAN_CHECK(items_of(p) <= kMost, "there may be ", kMost, " tiles of queries, got ", items_of(p));
    p.out = out.data, p.stride_b = out.stride[0], p.stride_l = out.stride[1], p.stride_n = out.stride[2];
}

void attend(TensorView const& q, TensorView const& q_scale, TensorView const& k, TensorView const& k_scale,
            TensorView const& v, TensorView const& v_scale, TensorView const& v_mean, TensorView const& kv_len,
            TensorView const& out, uintptr_t stream) {
    HopperParams p;
    set_out(p, out);
    set_lengths(p, kv_len, out);
    auto const floats = [&](TensorView const& t, char const* name, int64_t count) {
        return static_cast<float const*>(data_of(t, name, DType::f32, {p.B, p.N, count}, out));
    };
    p.codes.q = data_of(q, "q", DType::u8, {p.B, p.N, p.Lp, kFeatures}, out);
    p.codes.k = data_of(k, "k", DType::u8, {p.B, p.N, p.Lp, kFeatures}, out);
    p.codes.v = data_of(v, "v", DType::u8, {p.B, p.N, kFeatures, p.Lp}, out);
    p.codes.q_scale = floats(q_scale, "q_scale", p.Lp / sm90::kBlockRows);
    p.codes.k_scale = floats(k_scale, "k_scale", p.Lp / kKeys);
    p.codes.v_scale = floats(v_scale, "v_scale", kFeatures);
    p.codes.v_mean = floats(v_mean, "v_mean", kFeatures);
    auto const half = out.dtype == DType::bf16 ? run_hopper_bf16 : run_hopper_f16;
    auto const run = out.dtype == DType::f32 ? run_hopper_f32 : half;
    run(p, reinterpret_cast<void*>(stream));
}

}  // namespace

HUNYUAN_FAST_BIND(fp8_attention_hopper, m) {
    m.def("fp8_attention_hopper", &attend, py::call_guard<py::gil_scoped_release>());
}

}  // namespace hunyuan_fast::fp8_attention

#endif  // HUNYUAN_FAST_CUDA
