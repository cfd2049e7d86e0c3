// Launches of Hopper kernels. A header of its own: `<<<>>>` is no C++, and kernels are compiled for the host too, by
// tests that emulate the machine.
#pragma once

#include "common/cuda_check.h"

namespace hunyuan_fast::sm90 {

// Of the current device.
inline int processors() {
    int device = 0, count = 0;
    HUNYUAN_CUDA_CHECK(cudaGetDevice(&device));
    HUNYUAN_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, unsigned shared_bytes, void* stream,
            Arguments const&... arguments) {
    HUNYUAN_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    HUNYUAN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace hunyuan_fast::sm90
