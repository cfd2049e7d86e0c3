// What the native code sees of a tensor: a pointer, sizes, strides. It never sees torch.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace hunyuan_fast {

enum class DType { f64, f32, f16, bf16, i64, i32, u8 };

inline constexpr int kMaxDims = 6;
inline constexpr int kHost = -1;  // TensorView::device of a tensor in host memory

struct TensorView {
    void* data = nullptr;
    DType dtype = DType::f32;
    int device = kHost;  // index of the CUDA device, or kHost
    int ndim = 0;
    std::array<int64_t, kMaxDims> size{};
    std::array<int64_t, kMaxDims> stride{};  // in elements

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
    bool given() const { return ndim > 0; }  // or None came in its place
    int64_t numel() const;
    bool is_contiguous() const;
    std::string shape() const;  // "(2, 16, 3072)", for messages
};

char const* name_of(DType dtype);
int64_t element_size(DType dtype);  // in bytes

}  // namespace hunyuan_fast
