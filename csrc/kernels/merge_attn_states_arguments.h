// The parameters of the kernel that merges attention states: plain data that host and device share.
#pragma once

#include "ptx/types.cuh"

namespace dso {

struct MergeAttnStatesArguments {
    const void *out_a, *out_b;   // [num_groups, m, d], rows contiguous
    const float *lse_a, *lse_b;  // [num_groups, m], contiguous
    void* out;                   // [num_groups, m, d], contiguous, of out_a's type
    float* lse;                  // [num_groups, m], contiguous
    int64_t a_stride_group, a_stride_m;
    int64_t b_stride_group, b_stride_m;
    int64_t num_groups, m, d;
    uint32_t ctas_per_group;
};

}  // namespace dso
