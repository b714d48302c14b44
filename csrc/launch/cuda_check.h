#pragma once

#include <cuda_runtime.h>

#include "launch/status.h"

// Returns from the enclosing function with DSO_CUDA_ERROR when `expression` fails. CUDA also keeps the error for
// whoever asks next; it is taken back, so that nobody else trips over it.
#define DSO_CUDA(expression)                                                                           \
    do {                                                                                               \
        const cudaError_t dso_error_ = (expression);                                                   \
        if (dso_error_ != cudaSuccess) {                                                               \
            cudaGetLastError();                                                                        \
            return ::dso::fail(DSO_CUDA_ERROR, "%s: %s", #expression, cudaGetErrorString(dso_error_)); \
        }                                                                                              \
    } while (0)
