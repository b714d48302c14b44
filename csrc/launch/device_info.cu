#include <cuda_runtime.h>

#include "launch/deepseek_kernels.h"

extern "C" int dso_has_kernels_for(int device) {
    int major = 0;
    return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}
