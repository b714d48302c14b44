// What the ops on rows of activations ask of their operands alike.
#pragma once

#include "launch/deepseek_kernels.h"

namespace dso {

/// Whether `dtype` is one of those that can be quantized or normed.
bool is_high_precision(dso_dtype dtype);

/// Whether [groups, m, k] is within what the kernels can index: no negative extent, and k below `limit`.
bool are_extents(int64_t num_groups, int64_t m, int64_t k, int64_t limit);

/// Bytes of an element.
int size_of(dso_dtype dtype);

/// Whether a row of a [groups, m, k] tensor can be taken 16 bytes at a time.
bool rows_are_aligned(const void* x, dso_dtype dtype, int64_t stride_group, int64_t stride_m);

/// Whether `kv_scale` can be the scale of an FP8 cache: so that its inverse, and what it is multiplied by, are numbers.
bool is_kv_scale(float kv_scale);

}  // namespace dso
