// What every op needs of torch, through the LibTorch stable ABI only: one build serves every torch from
// TORCH_TARGET_VERSION on, with or without CUDA, and every Python.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>

#include "launch/deepseek_kernels.h"

namespace dso {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// Throws, as Python's RuntimeError, unless `condition`. Terse: `message` reaches the user only where Python's own
/// check, which has the words, finds nothing wrong (deepseek_ops/registry.py).
void require(bool condition, const char* message);

/// Throws dso_last_error() unless `status` is DSO_OK.
void require_ok(dso_status status);

/// torch's current stream on `device`.
dso_stream current_stream(int32_t device);

/// An uninitialised tensor on the device of `like`. `strides` in elements.
Tensor empty_strided(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, ScalarType dtype,
                     const Tensor& like);
Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, ScalarType dtype, const Tensor& like);

/// Whether `x` is of `dtype`, on the device of `like`, and of these sizes (-1: any).
bool is_tensor_of(const Tensor& x, ScalarType dtype, const Tensor& like, std::initializer_list<int64_t> sizes);

/// Whether the elements of a row are adjacent (a row of one element is whatever its stride).
bool has_contiguous_rows(const Tensor& x);

/// Between the indices of a dimension; 0 where there is only one, whatever stride that has.
int64_t stride_of(const Tensor& x, int64_t dim);

/// Whether the memory that `x` spans and that of `y` have no byte in common.
bool are_apart(const Tensor& x, const Tensor& y);

}  // namespace dso
