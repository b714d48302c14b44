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

dso_status encode_tensor_map(const TmaMatrices& x, TensorMap* map) {
    static const auto encode = find_encoder();
    if (!encode) return fail(DSO_CUDA_ERROR, "this driver has no cuTensorMapEncodeTiled");

    // With one row, or one matrix, the stride is never used, and torch leaves any number there.
    const int64_t row_bytes = x.columns * x.element_bytes;
    const int64_t stride_bytes = x.rows == 1 ? (row_bytes + 15) / 16 * 16 : x.stride * x.element_bytes;
    const int64_t matrix_bytes = x.matrices == 1 ? stride_bytes : x.stride_matrix * x.element_bytes;
    if (x.matrices > kMaxExtent || x.rows > kMaxExtent || x.columns > kMaxExtent || stride_bytes > kMaxStrideBytes ||
        matrix_bytes > kMaxStrideBytes)
        return fail(DSO_INVALID, "%lld matrices of %lld x %lld are more than TMA can address",
                    static_cast<long long>(x.matrices), static_cast<long long>(x.rows),
                    static_cast<long long>(x.columns));

    const cuuint64_t extents[3] = {static_cast<cuuint64_t>(x.columns), static_cast<cuuint64_t>(x.rows),
                                   static_cast<cuuint64_t>(x.matrices)};
    const cuuint64_t strides[2] = {static_cast<cuuint64_t>(stride_bytes), static_cast<cuuint64_t>(matrix_bytes)};
    const cuuint32_t box[3] = {static_cast<cuuint32_t>(x.box_columns), static_cast<cuuint32_t>(x.box_rows), 1};
    const cuuint32_t element_strides[3] = {1, 1, 1};
    const auto swizzle = x.is_swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE;
    CUtensorMap encoded;
    const auto encode_map = [&] {
        return encode(&encoded, data_type(x.element_bytes), 3, const_cast<void*>(x.base), extents, strides, box,
                      element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
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
