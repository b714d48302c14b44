// The parameters of the kernel that adds weighted rows up: plain data that host and device share.
#pragma once

#include "ptx/types.cuh"

namespace dso {

struct MoeUnpermuteArguments {
    const void* y;              // [num_rows, d], rows contiguous
    const int32_t* row_idx;     // [t, num_topk], contiguous
    const float* topk_weights;  // [t, num_topk], contiguous
    void* out;                  // [t, d], contiguous, of y's type
    int64_t num_rows, t, d, y_stride;
    int num_topk;
};

}  // namespace dso
