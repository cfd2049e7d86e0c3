// What Python sees: tensors are checked, turned into the structs of params.h, and handed to a launcher.
#include "common/check.h"
#include "common/registry.h"
#include "common/streaming.h"
#include "common/tensor_caster.h"
#include "fused_modulation/cpu.h"
#ifdef HUNYUAN_FAST_CUDA
#include "fused_modulation/cuda.h"
#endif

namespace hunyuan_fast::fused_modulation {
namespace {

using Shape = std::initializer_list<int64_t>;

bool is_floating(DType dtype) { return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16; }

// Holds every tensor of a call against the first of its rows. What is not given stays null.
class Call {
public:
    Call(TensorView const& x, TensorView const& vector) : x_(x), vector_(vector.dtype) {
        HUNYUAN_CHECK(x.ndim == 3 && x.size[2] > 0, "x must be (B, L, E) with E > 0, got ", x.shape());
        for (DType dtype : {x.dtype, vector_}) {
            HUNYUAN_CHECK(is_floating(dtype), "x and vectors must be float32, float16 or bfloat16, got ",
                          name_of(dtype));
        }
        sizes.B = x.size[0], sizes.L = x.size[1], sizes.E = x.size[2];
        if (vector.ndim == 3) sizes.M = vector.size[1];
    }

    Rows rows(TensorView const& t, char const* name, DType dtype) const {
        if (!t.given()) return {};
        check(t, name, dtype, {sizes.B, sizes.L, sizes.E});
        check_last(t, name);
        return {t.data, t.stride[0], t.stride[1]};
    }

    Rows rows(TensorView const& t, char const* name) const { return rows(t, name, x_.dtype); }

    Vectors vectors(TensorView const& t, char const* name) const {
        if (!t.given()) return {};
        check_last(t, name);
        if (t.ndim == 2) {
            check(t, name, vector_, {sizes.B, sizes.E});
            return {t.data, t.stride[0], 0};
        }
        check(t, name, vector_, {sizes.B, sizes.M, sizes.E});
        return {t.data, t.stride[0], t.stride[1]};
    }

    Index index(TensorView const& t, TensorView const& vector) const {
        HUNYUAN_CHECK(t.given() == (vector.ndim == 3), "vectors must be (B, M, E) with an index, (B, E) without");
        if (!t.given()) return {};
        HUNYUAN_CHECK(t.dtype == DType::i64 || t.dtype == DType::i32, "index must be int32 or int64, got ",
                      name_of(t.dtype));
        check(t, "index", t.dtype, {sizes.B, sizes.L});
        return {t.data, t.dtype == DType::i64, t.stride[0], t.stride[1]};
    }

    // (2, B, L): means, then reciprocal deviations.
    void statistics(TensorView const& t, float*& mean, float*& rstd) const {
        if (!t.given()) return;
        mean = contiguous<float>(t, "stats", DType::f32, {2, sizes.B, sizes.L});
        rstd = mean + sizes.B * sizes.L;
    }
    void statistics(TensorView const& t, float const*& mean, float const*& rstd) const {
        float *m = nullptr, *r = nullptr;
        statistics(t, m, r);
        mean = m, rstd = r;
    }

    void* gradient(TensorView const& t, char const* name, DType dtype) const {
        if (!t.given()) return nullptr;
        if (t.ndim == 2) return contiguous<void>(t, name, dtype, {sizes.B, sizes.E});
        return contiguous<void>(t, name, dtype, {sizes.B, sizes.M, sizes.E});
    }

    template <class T>
    T* contiguous(TensorView const& t, char const* name, DType dtype, Shape size) const {
        check(t, name, dtype, size);
        HUNYUAN_CHECK(t.is_contiguous(), name, " must be contiguous");
        return t.as<T>();
    }

    Sizes sizes;

private:
    void check(TensorView const& t, char const* name, DType dtype, Shape size) const {
        HUNYUAN_CHECK(t.dtype == dtype, name, " must be ", name_of(dtype), ", got ", name_of(t.dtype));
        HUNYUAN_CHECK(t.device == x_.device, name, " is on another device than x");
        bool fits = t.ndim == static_cast<int>(size.size());
        for (int i = 0; fits && i < t.ndim; ++i) fits = t.size[i] == size.begin()[i];
        HUNYUAN_CHECK(fits, name, " does not fit x: it has the shape ", t.shape());
    }

    static void check_last(TensorView const& t, char const* name) {
        int const last = t.ndim - 1;
        HUNYUAN_CHECK(t.size[last] <= 1 || t.stride[last] == 1, name, " must be contiguous in its last dimension");
    }

    TensorView const& x_;
    DType vector_;
};

// The outputs that are wanted, all of them new: whether to write them past the caches.
bool streamed(std::initializer_list<TensorView const*> outputs) {
    bool streams = true;
    for (TensorView const* out : outputs) {
        if (!out->given()) continue;
        if (out->device == kHost) prefer_huge_pages(*out);
        streams = streams && worth_streaming(*out);
    }
    return streams;
}

struct ForwardViews {
    TensorView x, y, gate, shift, scale, index, residual, modulated, stats;

    TensorView const& vector() const { return scale.given() ? scale : gate; }

    ForwardParams params(double eps) const {
        Call const call(x, vector());
        HUNYUAN_CHECK(gate.given() == y.given() && gate.given() == residual.given() && shift.given() == scale.given() &&
                          scale.given() == modulated.given() && scale.given() == stats.given(),
                      "a half of the call is incomplete");
        ForwardParams p;
        p.sizes = call.sizes;
        p.x = call.rows(x, "x");
        p.y = call.rows(y, "y", y.dtype);
        p.gate = call.vectors(gate, "gate");
        p.shift = call.vectors(shift, "shift");
        p.scale = call.vectors(scale, "scale");
        p.index = call.index(index, vector());
        p.residual = call.rows(residual, "residual");
        p.modulated = call.rows(modulated, "modulated");
        call.statistics(stats, p.mean, p.rstd);
        p.eps = eps;
        p.streams = p.sizes.E <= kMaxStreamed && streamed({&residual, &modulated});
        return p;
    }
};

struct BackwardViews {
    TensorView dresidual, dmodulated, residual, y, gate, scale, index, stats, partials;
    TensorView dx, dy, dshift, dscale, dgate;

    TensorView const& x() const { return residual.given() ? residual : dresidual; }
    TensorView const& vector() const { return scale.given() ? scale : gate; }

    BackwardParams params(int64_t chunk_rows, DType vector_gradient) const {
        Call const call(x(), vector());
        bool const norm = scale.given();
        HUNYUAN_CHECK(dmodulated.given() == norm && residual.given() == norm && stats.given() == norm &&
                          dx.given() == norm && dshift.given() == norm && dscale.given() == norm,
                      "the norm half of the call is incomplete");
        HUNYUAN_CHECK(dgate.given() == y.given() && (gate.given() || (norm && !y.given() && !dy.given())),
                      "the gate half of the call is incomplete");
        HUNYUAN_CHECK(chunk_rows > 0, "chunk_rows must be positive, got ", chunk_rows);
        BackwardParams p;
        p.sizes = call.sizes;
        p.chunk_rows = chunk_rows;
        p.chunks = (p.sizes.L + chunk_rows - 1) / chunk_rows;
        p.sums = (norm ? 2 : 0) + (dgate.given() ? 1 : 0);
        p.dresidual = call.rows(dresidual, "dresidual");
        p.dmodulated = call.rows(dmodulated, "dmodulated");
        p.residual = call.rows(residual, "residual");
        p.y = call.rows(y, "y", y.dtype);
        p.dx = call.rows(dx, "dx");
        p.dy = call.rows(dy, "dy", y.given() ? y.dtype : dy.dtype);
        p.gate = call.vectors(gate, "gate");
        p.scale = call.vectors(scale, "scale");
        p.index = call.index(index, vector());
        call.statistics(stats, p.mean, p.rstd);
        p.dshift = call.gradient(dshift, "dshift", vector_gradient);
        p.dscale = call.gradient(dscale, "dscale", vector_gradient);
        p.dgate = call.gradient(dgate, "dgate", vector_gradient);
        p.streams = streamed({&dx, &dy});
        if (p.sums) {
            auto const& s = p.sizes;
            p.partials = call.contiguous<float>(partials, "partials", DType::f32, {s.B, p.chunks, p.sums, s.M, s.E});
        }
        return p;
    }
};

void check_kind(Kind const& kind, TensorView const& x) {
    HUNYUAN_CHECK(x.device == kHost, "x must be in host memory");
    HUNYUAN_CHECK(kind.y == kind.x || (kind.x == DType::f32 && is_floating(kind.y)), "no kernel takes y of ",
                  name_of(kind.y), " beside x of ", name_of(kind.x));
}

void forward_host(TensorView const& x, TensorView const& shift, TensorView const& scale, double eps,
                  TensorView const& y, TensorView const& gate, TensorView const& index,
                  TensorView const& residual, TensorView const& modulated, TensorView const& stats,
                  int num_threads) {
    ForwardViews const v{x, y, gate, shift, scale, index, residual, modulated, stats};
    bool const gated = gate.given();
    Kind const kind{x.dtype, gated ? y.dtype : x.dtype, v.vector().dtype, gated, scale.given()};
    check_kind(kind, x);
    forward_cpu(kind, v.params(eps), num_threads);
}

void backward_host(TensorView const& dmodulated, TensorView const& residual, TensorView const& scale,
                   TensorView const& stats, TensorView const& dresidual, TensorView const& y,
                   TensorView const& gate, TensorView const& index, TensorView const& partials,
                   int64_t chunk_rows, TensorView const& dx, TensorView const& dshift, TensorView const& dscale,
                   TensorView const& dy, TensorView const& dgate, int num_threads) {
    BackwardViews const v{dresidual, dmodulated, residual, y,  gate,   scale,  index,
                          stats,     partials,   dx,       dy, dshift, dscale, dgate};
    DType const y_dtype = y.given() ? y.dtype : dy.given() ? dy.dtype : v.x().dtype;
    Kind const kind{v.x().dtype, y_dtype, v.vector().dtype, gate.given(), scale.given()};
    check_kind(kind, v.x());
    backward_cpu(kind, v.params(chunk_rows, kind.vector), num_threads);
}

#ifdef HUNYUAN_FAST_CUDA
Modulation modulation_of(TensorView const& x, TensorView const& scale) {
    HUNYUAN_CHECK(x.device != kHost, "x must be on a CUDA device");
    HUNYUAN_CHECK(scale.dtype == x.dtype || scale.dtype == DType::f32,
                  "scale must be float32 or of the dtype of x, got ", name_of(scale.dtype));
    return scale.dtype == DType::f32 ? Modulation::f32 : Modulation::as_x;
}

void forward_cuda(TensorView const& x, TensorView const& shift, TensorView const& scale, double eps,
                  TensorView const& modulated, TensorView const& stats, int threads, int vectors,
                  uintptr_t stream) {
    ForwardViews v;
    v.x = x, v.shift = shift, v.scale = scale, v.modulated = modulated, v.stats = stats;
    auto const launcher = x.dtype == DType::f32 ? forward_f32 : x.dtype == DType::f16 ? forward_f16 : forward_bf16;
    launcher(v.params(eps), modulation_of(x, scale), {threads, vectors, reinterpret_cast<void*>(stream)});
}

void backward_cuda(TensorView const& dmodulated, TensorView const& residual, TensorView const& scale,
                   TensorView const& stats, TensorView const& partials, int64_t chunk_rows, TensorView const& dx,
                   TensorView const& dshift, TensorView const& dscale, int threads, int vectors,
                   uintptr_t stream) {
    BackwardViews v;
    v.dmodulated = dmodulated, v.residual = residual, v.scale = scale, v.stats = stats;
    v.partials = partials, v.dx = dx, v.dshift = dshift, v.dscale = dscale;
    auto const launcher = residual.dtype == DType::f32   ? backward_f32
                          : residual.dtype == DType::f16 ? backward_f16
                                                         : backward_bf16;
    launcher(v.params(chunk_rows, DType::f32), modulation_of(residual, scale),
             {threads, vectors, reinterpret_cast<void*>(stream)});
}
#endif

}  // namespace

HUNYUAN_FAST_BIND(fused_modulation, m) {
    using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("fused_modulation_forward_cpu", &forward_host, release_gil());
    m.def("fused_modulation_backward_cpu", &backward_host, release_gil());
#ifdef HUNYUAN_FAST_CUDA
    m.def("fused_modulation_forward_cuda", &forward_cuda, release_gil());
    m.def("fused_modulation_backward_cuda", &backward_cuda, release_gil());
#endif
}

}  // namespace hunyuan_fast::fused_modulation
