// The driver encodes the maps. It is asked for by name at run time: the module loads where there is no driver.
#include "common/sm90_tensor_map.h"

#include <cuda.h>

#include <cstring>
#include <type_traits>

#include "common/cuda_check.h"

namespace hunyuan_fast::sm90 {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));

using Encode = std::remove_pointer_t<decltype(&cuTensorMapEncodeTiled)>;

Encode* find_encode() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    HUNYUAN_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
#else
    HUNYUAN_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result));
#endif
    if (result != cudaDriverEntryPointSuccess || found == nullptr) {
        throw std::runtime_error("the driver has no cuTensorMapEncodeTiled: it must know CUDA 12");
    }
    return reinterpret_cast<Encode*>(found);
}

CUtensorMapDataType type_of(Element element) {
    switch (element) {
        case Element::bf16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        case Element::f16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
        case Element::e4m3: return CU_TENSOR_MAP_DATA_TYPE_UINT8;
        case Element::f32: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    }
    throw std::runtime_error("no such element");
}

}  // namespace

TensorMap make_tensor_map(TensorBox const& tensor) {
    static Encode* const encode = find_encode();
    int const width = bytes_of(tensor.element);
    cuuint64_t sizes[4], strides[3];
    cuuint32_t box[4], ones[4] = {1, 1, 1, 1};
    cuuint64_t extent = width;  // of the dimensions before, in bytes
    for (int i = 0; i < 4; ++i) {
        sizes[i] = cuuint64_t(tensor.size[i]);
        box[i] = cuuint32_t(tensor.box[i]);
        if (i > 0) {
            // where there is no second one, its distance is free, but the driver looks at it: it might have to lie
            // beyond the first one
            strides[i - 1] = sizes[i] == 1 ? (extent + 15) / 16 * 16 : cuuint64_t(tensor.stride[i]) * width;
            extent = strides[i - 1];
        }
        extent *= sizes[i];
    }
    CUtensorMap map;
    CUresult const status =
        encode(&map, type_of(tensor.element), 4, const_cast<void*>(tensor.data), sizes, strides, box, ones,
               CU_TENSOR_MAP_INTERLEAVE_NONE, tensor.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        throw std::runtime_error("cuTensorMapEncodeTiled refused a tensor: CUresult " + std::to_string(int(status)));
    }
    TensorMap result;
    std::memcpy(&result, &map, sizeof(result));
    return result;
}

}  // namespace hunyuan_fast::sm90
