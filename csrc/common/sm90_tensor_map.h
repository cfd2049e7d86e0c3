// What a box of a tensor in global memory is to Hopper's copy engine: "Tensors" in the PTX ISA 9.0.
#pragma once

#include <cstdint>

namespace hunyuan_fast::sm90 {

// Passed to kernels as `__grid_constant__ TensorMap const`; CUtensorMap by another name.
struct alignas(128) TensorMap {
    uint64_t words[16];
};

enum class Element { bf16, f16, e4m3, f32 };

constexpr int bytes_of(Element element) { return element == Element::f32 ? 4 : element == Element::e4m3 ? 1 : 2; }

// Four dimensions, the first one contiguous. `data` and all strides are multiples of 16 bytes; the stride of a
// dimension of size 1 may be anything. A box, at most 256 elements each way, comes to shared memory with its first
// dimension innermost: swizzled, its rows are 128 bytes and lie as sm90_layout.h says of operand tiles; else one
// follows the other. What of a box lies outside the tensor is zero when copied, and left alone when stored.
struct TensorBox {
    void const* data = nullptr;
    Element element = Element::bf16;
    int64_t size[4] = {};
    int64_t stride[4] = {};  // in elements; the first is 1
    int box[4] = {};
    bool swizzled = true;
};

// Throws std::runtime_error with the driver's word when it refuses.
TensorMap make_tensor_map(TensorBox const& tensor);

}  // namespace hunyuan_fast::sm90
