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

dso_status encode_tensor(const TmaTensor& x, TensorMap* map) {
    static const auto encode = find_encoder();
    if (!encode) return fail(DSO_CUDA_ERROR, "this driver has no cuTensorMapEncodeTiled");

    cuuint64_t extents[4], strides[3];
    cuuint32_t box[4], element_strides[4];
    int64_t stride = (x.extents[0] * x.element_bytes + 15) / 16 * 16;
    for (int i = 0; i < x.rank; ++i) {
        // That of a dimension of one is never used, and torch leaves any number there.
        if (i > 0 && x.extents[i] > 1) stride = x.stride_bytes[i];
        if (x.extents[i] > kMaxExtent || (i > 0 && stride > kMaxStrideBytes))
            return fail(DSO_INVALID, "a dimension of %lld, %lld bytes apart, is more than TMA can address",
                        static_cast<long long>(x.extents[i]), static_cast<long long>(stride));
        if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(stride);
        extents[i] = static_cast<cuuint64_t>(x.extents[i]);
        box[i] = static_cast<cuuint32_t>(x.box[i]);
        element_strides[i] = 1;
    }
    const auto swizzle = x.is_swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE;
    const auto promotion = x.l2_bytes == 256 ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
    CUtensorMap encoded;
    const auto encode_map = [&] {
        return encode(&encoded, data_type(x.element_bytes), static_cast<cuuint32_t>(x.rank), const_cast<void*>(x.base),
                      extents, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion,
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

dso_status encode_tensor_map(const TmaMatrices& x, TensorMap* map) {
    const int64_t row_bytes = x.stride * x.element_bytes, matrix_bytes = x.stride_matrix * x.element_bytes;
    return encode_tensor({x.base,
                          3,
                          {x.columns, x.rows, x.matrices, 1},
                          {0, row_bytes, matrix_bytes, 0},
                          x.element_bytes,
                          {x.box_columns, x.box_rows, 1, 1},
                          x.is_swizzled,
                          128},
                         map);
}

}  // namespace dso
