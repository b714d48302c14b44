// Tensors of rows, [..., m, k], as the kernels see them: [groups, m, k] with two strides.
#pragma once

#include "torch/tensor.h"

namespace dso {

/// The extents and strides of [..., m, k]; a vector is a matrix of one row.
struct Rows {
    int64_t num_groups, m, k;
    int64_t stride_group, stride_m;
};

/// Whether one stride leads through all groups.
bool has_one_group_stride(const Tensor& x);

/// The rows of `x`, which has one group stride.
Rows rows_of(const Tensor& x);

/// The same for ops that take each row by itself: groups of one row are the rows of one group.
Rows single_rows_of(const Tensor& x);

/// `x` itself, or its contiguous copy where its leading dimensions cannot be one.
Tensor with_one_group_stride(const Tensor& x);

/// An uninitialised contiguous tensor of the shape of `x`, but for its last dimension.
Tensor empty_rows(const Tensor& x, int64_t k, ScalarType dtype);

/// Uninitialised scales, [..., m, ceil(k / 128)], for the quantized rows of `x` of `k` columns: row-major, or MN-major
/// with columns that start at multiples of 16 bytes.
Tensor empty_scales(const Tensor& x, int64_t k, bool mn_major);

/// The interface's name of x's type, which must be bfloat16, float16 or float32.
dso_dtype high_precision_dtype(const Tensor& x, const char* message);

}  // namespace dso
