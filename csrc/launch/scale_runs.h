// Scales that TMA brings a step's run at a time: the MN-major ones.
#pragma once

#include "launch/tensor_map.h"

namespace dso {

/// One float per row per 128 of K, of one matrix or several.
struct ScaleRuns {
    const float* base;
    int64_t rows, k, stride_row, stride_k;
    int64_t matrices = 1, stride_matrix = 0;
};

/// Whether the scales of neighbouring rows are neighbours, and each run of them starts at a multiple of 16 bytes.
bool are_scale_runs(const ScaleRuns& x);

/// The map of such scales: matrices of ceil(k / 128) rows, in boxes of one run of `length`.
dso_status encode_scale_runs(const ScaleRuns& x, int length, TensorMap* map);

}  // namespace dso
