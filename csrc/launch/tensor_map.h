#pragma once

#include "launch/deepseek_kernels.h"
#include "ptx/types.cuh"

namespace dso {

/// Row-major matrices that TMA reads or writes in boxes of one matrix.
struct TmaMatrices {
    const void* base;                 // 16-byte aligned
    int64_t matrices, rows, columns;  // at least 1
    int64_t stride_matrix, stride;    // elements between matrices and between rows; multiples of 16 bytes
    int element_bytes;                // 1, 2 or 4
    int box_rows, box_columns;        // at most 256 each
    bool is_swizzled;                 // rows of 128 bytes under the 128-byte swizzle, or as they are
};

/// Encodes the descriptor; DSO_INVALID, with the reason, where it is outside what TMA can address.
dso_status encode_tensor_map(const TmaMatrices& x, TensorMap* map);

}  // namespace dso
