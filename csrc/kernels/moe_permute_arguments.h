// The parameters of the kernel that gathers rows: plain data that host and device share.
#pragma once

#include "ptx/types.cuh"

namespace dso {

struct MoePermuteArguments {
    const void* x;             // [t, d] elements
    const int32_t* token_idx;  // [num_rows]
    void* out;                 // [num_rows, d], contiguous
    int64_t t, d, num_rows;
    int64_t x_stride_t, x_stride_d;
};

}  // namespace dso
