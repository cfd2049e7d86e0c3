// The functions of csrc/common/sm90_launch.cuh, done by the emulated machine.
#pragma once

#include <cuda_runtime.h>

namespace hunyuan_fast::sm90 {

inline int processors() { return hopper::processors(); }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, unsigned shared_bytes, void*,
            Arguments const&... arguments) {
    hopper::launch({grid, {threads, 1, 1}, shared_bytes, 1}, [&] { kernel(arguments...); });
}

template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), unsigned cluster, dim3 grid, unsigned threads,
                     unsigned shared_bytes, void*, Arguments const&... arguments) {
    hopper::launch({grid, {threads, 1, 1}, shared_bytes, cluster}, [&] { kernel(arguments...); });
}

}  // namespace hunyuan_fast::sm90
