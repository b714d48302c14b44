// The quantization kernel's parameters: plain data that host and device share.
#pragma once

#include "ptx/types.cuh"

namespace dso {

struct PerTokenCastArguments {
    const void* x;  // [num_groups, m, k], rows contiguous
    uint8_t* q;     // [num_groups, m, k], contiguous
    float* sf;      // [num_groups, m, ceil(k / 128)]
    int64_t num_groups, m, k;
    int64_t x_stride_group, x_stride_m;
    int64_t sf_stride_group, sf_stride_m, sf_stride_k;
    float amax_floor;
    bool use_ue8m0;
    bool rows_are_adjacent;  // sf is MN-major: deal blocks row by row
};

}  // namespace dso
