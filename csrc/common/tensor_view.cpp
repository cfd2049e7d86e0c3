#include "common/tensor_view.h"

namespace hunyuan_fast {

int64_t TensorView::numel() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= size[i];
    return count;
}

bool TensorView::is_contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
        if (size[i] == 0) return true;
        // the stride of a dimension of one element is never used
        if (size[i] != 1 && stride[i] != expected) return false;
        expected *= size[i];
    }
    return true;
}

std::string TensorView::shape() const {
    std::string text = "(";
    for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(size[i]);
    return text + (ndim == 1 ? ",)" : ")");
}

char const* name_of(DType dtype) {
    switch (dtype) {
        case DType::f64: return "float64";
        case DType::f32: return "float32";
        case DType::f16: return "float16";
        case DType::bf16: return "bfloat16";
        case DType::i64: return "int64";
        case DType::i32: return "int32";
        case DType::u8: return "uint8";
    }
    return "unknown";
}

int64_t element_size(DType dtype) {
    switch (dtype) {
        case DType::f64:
        case DType::i64: return 8;
        case DType::f32:
        case DType::i32: return 4;
        case DType::f16:
        case DType::bf16: return 2;
        case DType::u8: return 1;
    }
    return 0;
}

}  // namespace hunyuan_fast
