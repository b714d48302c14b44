// The grouped bfloat16 GEMM's parameters: plain data that host and device share.
#pragma once

#include "device/row_layout.h"

namespace dso {

struct Bf16GemmMaps {
    TensorMap a;  // [m, k], a box of Bf16SwapAbShape::kBoxRows rows
    TensorMap b;  // [groups, n, k], a box of BLOCK_N rows
};

struct Bf16GemmArguments {
    RowSchedule schedule;
    int k;
    uint16_t* d;  // [m, n] bfloat16
    int64_t d_stride;
    bool clears_unowned;  // nobody's rows of d become zeros
};

}  // namespace dso
