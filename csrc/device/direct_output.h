// Where an epilogue that stores straight from registers writes; the host fills it in.
#pragma once

#include "ptx/types.cuh"

namespace dso {

struct DirectOutput {
    void* d;         // [m, n] bfloat16 or float32
    int64_t stride;  // elements between rows
    bool is_bf16, accumulate;
};

}  // namespace dso
