// The SwiGLU kernel's parameters: plain data that host and device share.
#pragma once

#include "device/cast_output.h"

namespace dso {

struct SiluMulArguments {
    const void* x;  // [num_groups, m, 2 * d], rows contiguous
    void* y;        // [num_groups, m, d], contiguous, of x's type; unused by the quantizing kernel
    int64_t x_stride_group, x_stride_m;
    int64_t num_groups, m, d;
    CastOutput output;  // of the quantizing kernel
};

}  // namespace dso
