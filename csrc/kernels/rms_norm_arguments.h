// The norm kernel's parameters: plain data that host and device share.
#pragma once

#include "device/cast_output.h"

namespace dso {

struct RmsNormArguments {
    const void* x;         // [num_groups, m, d], rows contiguous
    const void* residual;  // the same, of strides of its own; only where it is added
    const void* weight;    // [d]
    void* residual_out;    // [num_groups, m, d], contiguous; only where the residual is added
    void* y;               // [num_groups, m, d], contiguous; only where it is not quantized
    int64_t x_stride_group, x_stride_m;
    int64_t residual_stride_group, residual_stride_m;
    int64_t num_groups, m, d;
    uint32_t ctas_per_group;
    float eps, inverse_d;
    CastOutput output;  // where it is quantized
};

}  // namespace dso
