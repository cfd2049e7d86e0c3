// How Hopper's kernels are started: on the current device, with as much shared memory as a block may have.
#pragma once

#include "common/cuda_check.h"

#include <cstdint>

namespace hunyuan_fast::sm90 {

inline int processors() {
    int device = 0, count = 0;
    HUNYUAN_CUDA_CHECK(cudaGetDevice(&device));
    HUNYUAN_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, int threads, uint32_t shared_bytes, void* stream,
            Arguments const&... arguments) {
    HUNYUAN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
    kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    HUNYUAN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace hunyuan_fast::sm90
