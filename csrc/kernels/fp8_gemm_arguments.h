// The FP8 GEMM kernel's parameters: plain data that host and device share.
#pragma once

#include "ptx/types.cuh"

namespace dso {

struct Fp8GemmMaps {
    TensorMap a, b;
    TensorMap sfa;  // only where sfa comes by TMA
    TensorMap d;    // only where the epilogue stores by TMA
};

struct Fp8GemmArguments {
    const float* sfa;  // [m, ceil(k / 128)], strides below
    const float* sfb;  // [ceil(n / 128), ceil(k / 128)], strides below
    int64_t sfa_stride_m, sfa_stride_k, sfb_stride_n, sfb_stride_k;
    int m, n, k;
};

}  // namespace dso
