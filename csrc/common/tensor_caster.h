// torch.Tensor -> TensorView, through the Python attributes of the tensor; None -> a view without dimensions. The
// view borrows: the caller's tensor must outlive the call, which every argument of a Python call does.
//
// Calls on small tensors are made of little else, so names are interned and dtypes are told by identity.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "common/check.h"
#include "common/tensor_view.h"

namespace hunyuan_fast {

class ViewReader {
public:
    // The reader of this process; its names and dtypes live as long as Python does.
    static ViewReader const& the() {
        PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<ViewReader> storage;
        return storage.call_once_and_store_result([] { return ViewReader(); }).get_stored();
    }

    // Needs the GIL.
    TensorView read(pybind11::handle tensor) const {
        TensorView view;
        if (tensor.is_none()) return view;
        auto const shape = taken(PyObject_GetAttr(tensor.ptr(), shape_));
        auto const stride = taken(PyObject_CallMethodNoArgs(tensor.ptr(), stride_));
        auto const ndim = PyTuple_Check(shape.ptr()) ? PyTuple_GET_SIZE(shape.ptr()) : -1;
        HUNYUAN_CHECK(ndim >= 0 && ndim <= kMaxDims && PyTuple_Check(stride.ptr()) &&
                          PyTuple_GET_SIZE(stride.ptr()) == ndim,
                      "a tensor has at most ", kMaxDims, " dimensions here, with a stride for each");
        view.ndim = static_cast<int>(ndim);
        for (int i = 0; i < view.ndim; ++i) {
            view.size[i] = integer(PyTuple_GET_ITEM(shape.ptr(), i));
            view.stride[i] = integer(PyTuple_GET_ITEM(stride.ptr(), i));
        }
        view.dtype = dtype_of(taken(PyObject_GetAttr(tensor.ptr(), dtype_)).ptr());
        view.device = static_cast<int>(integer(taken(PyObject_CallMethodNoArgs(tensor.ptr(), device_)).ptr()));
        view.data = PyLong_AsVoidPtr(taken(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr_)).ptr());
        if (view.data == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
        HUNYUAN_CHECK(view.data != nullptr || view.numel() == 0, "a tensor of shape ", view.shape(), " has no memory");
        return view;
    }

private:
    ViewReader() {
        auto const torch = pybind11::module_::import("torch");
        for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::i64, DType::i32, DType::f64, DType::u8}) {
            dtypes_.emplace_back(torch.attr(name_of(dtype)).ptr(), dtype);
        }
    }

    static pybind11::object taken(PyObject* reference) {
        if (reference == nullptr) throw pybind11::error_already_set();
        return pybind11::reinterpret_steal<pybind11::object>(reference);
    }

    static int64_t integer(PyObject* number) {
        long long const value = PyLong_AsLongLong(number);
        if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
        return value;
    }

    DType dtype_of(PyObject* dtype) const {
        for (auto const& [known, value] : dtypes_) {
            if (known == dtype) return value;
        }
        refuse("no kernel takes tensors of ", pybind11::str(pybind11::handle(dtype)).cast<std::string>());
    }

    PyObject* const shape_ = PyUnicode_InternFromString("shape");
    PyObject* const stride_ = PyUnicode_InternFromString("stride");
    PyObject* const dtype_ = PyUnicode_InternFromString("dtype");
    PyObject* const device_ = PyUnicode_InternFromString("get_device");
    PyObject* const data_ptr_ = PyUnicode_InternFromString("data_ptr");
    std::vector<std::pair<PyObject*, DType>> dtypes_;
};

}  // namespace hunyuan_fast

namespace pybind11::detail {

template <>
struct type_caster<hunyuan_fast::TensorView> {
    PYBIND11_TYPE_CASTER(hunyuan_fast::TensorView, const_name("torch.Tensor | None"));

    bool load(handle src, bool) {
        value = hunyuan_fast::ViewReader::the().read(src);
        return true;
    }
};

}  // namespace pybind11::detail
