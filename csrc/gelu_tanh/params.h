// What crosses from the host to the kernels: pointers, sizes, strides in elements.  No torch, no pybind11.
#pragma once

#include <cstdint>

namespace hunyuan_fast::gelu_tanh {

inline constexpr int kMaxOuter = 5;  // dimensions besides the last

// Rows of equal width, numbered over the outer dimensions, the last of which counts fastest.
struct Grid {
    int outer = 0;
    int64_t size[kMaxOuter] = {};
    int64_t rows = 1;   // the product of the sizes
    int64_t width = 0;  // elements of a row, adjacent in memory
};

struct Rows {
    void* data = nullptr;
    int64_t stride[kMaxOuter] = {};
};

// y = x sigmoid(2 u), see kernels/gelu_tanh; y may be x.
struct ForwardParams {
    Grid grid;
    Rows x;
    Rows y;
    bool streams = false;  // past the caches
};

// dx = dy gelu'(x).
struct BackwardParams {
    Grid grid;
    Rows dy;
    Rows x;
    Rows dx;
    bool streams = false;  // past the caches
};

// The rows that stand before those of y: copied as they are, element_size bytes for each element.
struct CopyParams {
    Grid grid;
    Rows from;
    Rows to;
    int64_t element_size = 0;
};

}  // namespace hunyuan_fast::gelu_tanh
