// The rotation kernel's parameters: plain data that host and device share.
#pragma once

#include "device/indices.cuh"

namespace dso {

struct RopeArguments {
    const void* x;         // [t, num_heads, d], rows contiguous
    void* y;               // [t, num_heads, d], contiguous, of x's type
    const float* cos_sin;  // [max_position, d], rows contiguous
    Indices positions;
    int64_t x_stride_t, x_stride_head, cos_sin_stride;
    int64_t t, num_heads, max_position;
    int d;
};

}  // namespace dso
