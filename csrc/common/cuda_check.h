// HUNYUAN_CUDA_CHECK(cudaGetLastError()) raises RuntimeError with CUDA's own words. For .cu files.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define HUNYUAN_CUDA_CHECK(call)                                                          \
    do {                                                                                  \
        cudaError_t const status = (call);                                                \
        if (status != cudaSuccess) {                                                      \
            throw std::runtime_error(std::string(#call ": ") + cudaGetErrorString(status)); \
        }                                                                                 \
    } while (false)
