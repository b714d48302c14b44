#pragma once

#include "launch/deepseek_kernels.h"
#include "ptx/types.cuh"

namespace dso {

/// A tensor of up to four dimensions, the innermost first, that TMA reads or writes in boxes.
struct TmaTensor {
    const void* base;  // 16-byte aligned
    int rank;
    int64_t extents[4];       // elements, at least 1
    int64_t stride_bytes[4];  // of each dimension, multiples of 16; that of the innermost is not looked at
    int element_bytes;        // 1, 2 or 4
    int box[4];               // elements, at most 256
    bool is_swizzled;         // a box's rows are 128 bytes under the 128-byte swizzle, or as they are
    int l2_bytes;             // that L2 asks memory for at a time: 128 or 256
};

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
dso_status encode_tensor(const TmaTensor& x, TensorMap* map);
dso_status encode_tensor_map(const TmaMatrices& x, TensorMap* map);

}  // namespace dso
