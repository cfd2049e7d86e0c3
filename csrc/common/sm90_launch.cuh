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

// In clusters of so many blocks: those whose numbers (x) follow a multiple of that.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), unsigned cluster, dim3 grid, unsigned threads, unsigned shared_bytes,
                     void* stream, Arguments const&... arguments) {
    HUNYUAN_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream), config.attrs = &attribute, config.numAttrs = 1;
    HUNYUAN_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace hunyuan_fast::sm90
