// Where an epilogue writes; the host fills it in.
#pragma once

#include "ptx/types.cuh"

namespace dso {

struct DirectOutput {
    void* d;                        // [matrices, m, n] bfloat16 or float32
    int64_t stride_matrix, stride;  // elements between matrices, and between rows
    bool is_bf16, accumulate;
};

}  // namespace dso
