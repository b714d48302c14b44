// TMA descriptors without linking libcuda: the encoder comes from the driver that the runtime has loaded.
#include "launch/tensor_map.h"

#include <cudaTypedefs.h>

#include <cstring>

#include "launch/cuda_check.h"

namespace dso {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "TensorMap is CUtensorMap's bytes");

constexpr int64_t kMaxExtent = int64_t{1} << 32;
constexpr int64_t kMaxStrideBytes = (int64_t{1} << 40) - 1;

CUtensorMapDataType data_type(int element_bytes) {
    switch (element_bytes) {
        case 1:
            return CU_TENSOR_MAP_DATA_TYPE_UINT8;
        case 2:
            return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        default:
            return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    }
}

PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
}

}  // namespace

dso_status encode_tensor_map(const TmaMatrix& matrix, TensorMap* map) {
    static const auto encode = find_encoder();
    if (!encode) return fail(DSO_CUDA_ERROR, "this driver has no cuTensorMapEncodeTiled");

    // With one row the stride is never used, and torch leaves any number there.
    const int64_t row_bytes = matrix.columns * matrix.element_bytes;
    const int64_t stride_bytes = matrix.rows == 1 ? (row_bytes + 15) / 16 * 16 : matrix.stride * matrix.element_bytes;
    if (matrix.rows > kMaxExtent || matrix.columns > kMaxExtent || stride_bytes > kMaxStrideBytes)
        return fail(DSO_INVALID, "a matrix of %lld x %lld is more than TMA can address",
                    static_cast<long long>(matrix.rows), static_cast<long long>(matrix.columns));

    const cuuint64_t extents[2] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride_bytes)};
    const cuuint32_t box[2] = {static_cast<cuuint32_t>(matrix.box_columns), static_cast<cuuint32_t>(matrix.box_rows)};
    const cuuint32_t element_strides[2] = {1, 1};
    const auto swizzle = matrix.is_swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE;
    CUtensorMap encoded;
    const auto encode_map = [&] {
        return encode(&encoded, data_type(matrix.element_bytes), 2, const_cast<void*>(matrix.base), extents, strides,
                      box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    };
    CUresult error = encode_map();
    if (error == CUDA_ERROR_INVALID_CONTEXT || error == CUDA_ERROR_NOT_INITIALIZED) {
        // The driver's function wants a current context, and a host thread new to CUDA has none until the runtime sets
        // its device: here, the one that is current already.
        int device;
        DSO_CUDA(cudaGetDevice(&device));
        DSO_CUDA(cudaSetDevice(device));
        error = encode_map();
    }
    if (error != CUDA_SUCCESS)
        return fail(DSO_CUDA_ERROR, "cuTensorMapEncodeTiled: CUresult %d", static_cast<int>(error));
    memcpy(map, &encoded, sizeof(encoded));
    return DSO_OK;
}

}  // namespace dso
