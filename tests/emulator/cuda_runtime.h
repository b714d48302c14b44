// CUDA's own header, and what nvcc adds to it: the built-in variables and functions that kernels use.
#pragma once

#define __STORAGE__ extern  // of threadIdx and the like: constants for each thread, but not for the emulator
#include_next <cuda_runtime.h>
#include <device_launch_parameters.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __launch_bounds__(...)

#include "builtins.h"

// ------------------------------------------------------------------------------------------------ launches

namespace emulator {
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body);
}

/// Goes before CUDA's own, which takes a pointer to a constant, and knows no kernel's type any more when it launches.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
    return emulator::launch(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
