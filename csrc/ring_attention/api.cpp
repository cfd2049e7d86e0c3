// What Python sees: tensors are checked, turned into the structs of params.h, and handed to a launcher.
#include "common/check.h"
#include "common/registry.h"
#include "common/tensor_caster.h"
#include "ring_attention/cpu.h"

namespace py = pybind11;

namespace hunyuan_fast::ring_attention {
namespace {

void check(TensorView const& t, char const* name, int ndim, DType dtype) {
    HUNYUAN_CHECK(t.device == kHost, name, " must be in host memory");
    HUNYUAN_CHECK(t.dtype == dtype, name, " must be ", name_of(dtype), ", got ", name_of(t.dtype));
    HUNYUAN_CHECK(t.ndim == ndim, name, " must have ", ndim, " dimensions, got the shape ", t.shape());
}

Sizes sizes_of(TensorView const& out) {
    check(out, "out", 4, DType::f32);
    return {out.size[0], out.size[1], out.size[2], out.size[3]};
}

Rows rows(TensorView const& t, char const* name, Sizes const& s, DType dtype) {
    check(t, name, 4, dtype);
    bool const fits = t.size[0] == s.B && t.size[1] == s.L && t.size[2] == s.N && t.size[3] == s.D;
    HUNYUAN_CHECK(fits, name, " must have the shape of out, got ", t.shape());
    HUNYUAN_CHECK(s.D <= 1 || t.stride[3] == 1, name, " must be contiguous in its last dimension");
    return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

Numbers numbers(TensorView const& t, char const* name, Sizes const& s) {
    check(t, name, 3, DType::f32);
    bool const fits = t.size[0] == s.B && t.size[1] == s.N && t.size[2] == s.L;
    HUNYUAN_CHECK(fits, name, " must be (B, N, L) for the sizes of out, got ", t.shape());
    return {t.as<float>(), t.stride[0], t.stride[2], t.stride[1]};
}

void check_part(TensorView const& part) {
    HUNYUAN_CHECK(part.dtype == DType::f32 || part.dtype == DType::f16 || part.dtype == DType::bf16,
                  "part must be float32, float16 or bfloat16, got ", name_of(part.dtype));
}

void forward_host(TensorView const& out, TensorView const& lse, TensorView const& part, TensorView const& part_lse,
                  TensorView const& new_out, TensorView const& new_lse, int num_threads) {
    check_part(part);
    ForwardParams p;
    p.size = sizes_of(out);
    p.out = rows(out, "out", p.size, DType::f32);
    p.part = rows(part, "part", p.size, part.dtype);
    p.new_out = rows(new_out, "new_out", p.size, DType::f32);
    p.lse = numbers(lse, "lse", p.size);
    p.part_lse = numbers(part_lse, "part_lse", p.size);
    p.new_lse = numbers(new_lse, "new_lse", p.size);
    forward_cpu(part.dtype, p, num_threads);
}

void backward_host(TensorView const& dout, TensorView const& dlse, TensorView const& out, TensorView const& lse,
                   TensorView const& part, TensorView const& part_lse, TensorView const& dfirst,
                   TensorView const& dfirst_lse, TensorView const& dpart, TensorView const& dpart_lse,
                   int num_threads) {
    check_part(part);
    BackwardParams p;
    p.size = sizes_of(out);
    p.dout = rows(dout, "dout", p.size, DType::f32);
    p.out = rows(out, "out", p.size, DType::f32);
    p.part = rows(part, "part", p.size, part.dtype);
    p.dfirst = rows(dfirst, "dfirst", p.size, DType::f32);
    p.dpart = rows(dpart, "dpart", p.size, part.dtype);
    if (dlse.given()) p.dlse = numbers(dlse, "dlse", p.size);
    p.lse = numbers(lse, "lse", p.size);
    p.part_lse = numbers(part_lse, "part_lse", p.size);
    p.dfirst_lse = numbers(dfirst_lse, "dfirst_lse", p.size);
    p.dpart_lse = numbers(dpart_lse, "dpart_lse", p.size);
    backward_cpu(part.dtype, p, num_threads);
}

}  // namespace

HUNYUAN_FAST_BIND(ring_attention, m) {
    using release_gil = py::call_guard<py::gil_scoped_release>;
    m.def("ring_attention_merge_cpu", &forward_host, release_gil());
    m.def("ring_attention_merge_backward_cpu", &backward_host, release_gil());
}

}  // namespace hunyuan_fast::ring_attention
