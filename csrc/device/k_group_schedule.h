// Which columns each group of a K-grouped GEMM owns: plain data that host and device share.
#pragma once

#include "ptx/types.cuh"

namespace dso {

/// Group i owns the columns k_offsets[i] to k_offsets[i + 1] of both operands.
struct KGroupSchedule {
    const int32_t* k_offsets;  // [num_groups + 1]
    int num_groups;
    int m, n, k;  // k: of all groups
};

}  // namespace dso
