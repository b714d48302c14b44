// Where quantized values and their scales go: plain data that host and device share.
#pragma once

#include "ptx/types.cuh"

namespace dso {

struct CastOutput {
    uint8_t* q;  // [num_groups, m, k] e4m3, contiguous
    float* sf;   // [num_groups, m, ceil(k / 128)]
    int64_t sf_stride_group, sf_stride_m, sf_stride_k;
    float amax_floor;
    bool use_ue8m0;
};

}  // namespace dso
