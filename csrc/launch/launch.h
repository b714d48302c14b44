#pragma once

#include <atomic>

#include "launch/cuda_check.h"

namespace dso {

/// Allows `kernel` its dynamic shared memory, once for each device.
template <auto kernel>
dso_status allow_shared_memory(int device, int shared_bytes) {
    static std::atomic<uint64_t> done{0};  // a bit a device; the call is idempotent, so a race only repeats it
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (done.load(std::memory_order_relaxed) & bit) return DSO_OK;
    DSO_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    done.fetch_or(bit, std::memory_order_relaxed);
    return DSO_OK;
}

struct LaunchShape {
    dim3 grid, threads;
    int shared_bytes;
    dso_stream stream;
    int cluster_size = 1;
    // The kernel may start while the one before it in the stream ends; it must wait before it touches global memory.
    bool is_programmatic_dependent = false;
};

/// Launches `kernel`, and says how that went. (After <<< >>> one would ask for the last error, which may be another's.)
template <typename... Parameters, typename... Arguments>
dso_status launch_kernel(void (*kernel)(Parameters...), const LaunchShape& shape, const Arguments&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = shape.threads;
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(shape.stream);
    cudaLaunchAttribute attributes[2];
    config.attrs = attributes;
    if (shape.cluster_size > 1) {
        cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster_size), 1, 1};
    }
    if (shape.is_programmatic_dependent) {
        cudaLaunchAttribute& dependent = attributes[config.numAttrs++];
        dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        dependent.val.programmaticStreamSerializationAllowed = 1;
    }
    DSO_CUDA(cudaLaunchKernelEx(&config, kernel, arguments...));
    return DSO_OK;
}

}  // namespace dso
