// The driver's part: tensor maps, with the bounds that the driver's documentation sets.
#include <cstring>

#include "cuda.h"
#include "cuda_runtime.h"

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                cuuint64_t const* sizes, cuuint64_t const* strides, cuuint32_t const* box,
                                cuuint32_t const* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    hopper::Box made = {};
    made.mark = hopper::kMapMark;
    made.data = static_cast<char*>(data);
    made.width = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
    made.swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
    bool right = rank == 4 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (int i = 0; i < 4 && right; ++i) {
        made.sizes[i] = uint32_t(sizes[i]), made.box[i] = uint16_t(box[i]);
        made.strides[i] = i == 0 ? made.width : strides[i - 1];
        right = sizes[i] > 0 && sizes[i] <= 1ull << 32 && box[i] > 0 && box[i] <= 256 && steps[i] == 1;
        if (i > 0) right = right && made.strides[i] % 16 == 0 && made.strides[i] < 1ull << 40;
    }
    // the documentation has rows follow each other, with a gap or none
    right = right && made.strides[1] >= sizes[0] * made.width;
    uint32_t const row = box[0] * made.width;
    right = right && row % 16 == 0 && (!made.swizzled || row == 128);
    if (!right) return CUDA_ERROR_INVALID_VALUE;
    static_assert(sizeof made <= sizeof *map);
    std::memcpy(map, &made, sizeof made);
    return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(char const* name, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    bool const known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
    *found = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
    *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
