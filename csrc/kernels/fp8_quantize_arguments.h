// The quantization kernels' parameters: plain data that host and device share.
#pragma once

#include "device/cast_output.h"

namespace dso {

struct PerTokenCastArguments {
    const void* x;  // [num_groups, m, k], rows contiguous
    int64_t x_stride_group, x_stride_m;
    int64_t num_groups, m, k;
    CastOutput output;
};

struct PerBlockCastArguments {
    const void* x;  // [num_groups, n, k], rows contiguous
    uint8_t* q;     // [num_groups, n, k], contiguous
    float* sf;      // [num_groups, ceil(n / 128), ceil(k / 128)], contiguous
    int64_t num_groups, n, k;
    int64_t x_stride_group, x_stride_n;
    float amax_floor;
    bool use_ue8m0;
};

}  // namespace dso
