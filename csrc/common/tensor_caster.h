// torch.Tensor -> TensorView, through the Python attributes of the tensor. The view borrows: the
// caller's tensor must outlive the call, which every argument of a Python call does.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string_view>

#include "common/check.h"
#include "common/tensor_view.h"

namespace hunyuan_fast {

inline std::optional<DType> dtype_of(std::string_view name) {
    for (DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16, DType::i64, DType::i32, DType::u8}) {
        if (name == std::string("torch.") + name_of(dtype)) return dtype;
    }
    return std::nullopt;
}

}  // namespace hunyuan_fast

namespace pybind11::detail {

template <>
struct type_caster<hunyuan_fast::TensorView> {
    PYBIND11_TYPE_CASTER(hunyuan_fast::TensorView, const_name("torch.Tensor"));

    bool load(handle src, bool) {
        if (!hasattr(src, "data_ptr")) return false;
        auto const shape = src.attr("shape").cast<tuple>();
        auto const stride = src.attr("stride")().cast<tuple>();
        auto const dtype = str(src.attr("dtype")).cast<std::string>();
        auto const known = hunyuan_fast::dtype_of(dtype);
        HUNYUAN_CHECK(known.has_value(), "no kernel takes tensors of ", dtype);
        HUNYUAN_CHECK(shape.size() <= hunyuan_fast::kMaxDims, "a tensor has at most ", hunyuan_fast::kMaxDims,
                      " dimensions here, got ", shape.size());
        value.data = reinterpret_cast<void*>(src.attr("data_ptr")().cast<uintptr_t>());
        value.dtype = *known;
        value.device = src.attr("get_device")().cast<int>();
        value.ndim = static_cast<int>(shape.size());
        for (int i = 0; i < value.ndim; ++i) {
            value.size[i] = shape[i].cast<int64_t>();
            value.stride[i] = stride[i].cast<int64_t>();
        }
        return true;
    }
};

}  // namespace pybind11::detail
