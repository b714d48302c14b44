// The few functions of CUDA's runtime that csrc/launch/ calls. Device n is a Hopper GPU of n SMs, because the package
// asks each device only once how many it has.
#include <cuda_runtime.h>

#include <cudaTypedefs.h>

#include <cstring>
#include <map>

#include "machine.h"
#include "tensor_map.h"

namespace emulator {

namespace {
constexpr size_t kDefaultDynamicBytes = 48 * 1024;
std::map<const void*, size_t> allowed_dynamic_bytes;  // by kernel, where more than the default
}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body) {
    const auto allowed = allowed_dynamic_bytes.find(kernel);
    if (config.dynamicSmemBytes > (allowed == allowed_dynamic_bytes.end() ? kDefaultDynamicBytes : allowed->second))
        return cudaErrorInvalidValue;
    Launch launch{config.gridDim, config.blockDim, static_cast<uint32_t>(config.dynamicSmemBytes), 1};
    for (unsigned i = 0; i < config.numAttrs; ++i) {
        if (config.attrs[i].id == cudaLaunchAttributeClusterDimension)
            launch.cluster_size = config.attrs[i].val.clusterDim.x;
    }
    return run_grid(launch, body) ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulator

extern "C" {

cudaError_t cudaGetDevice(int* device) {
    *device = emulator::num_sms();
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor:
            *value = 9;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            *value = 0;
            return cudaSuccess;
        case cudaDevAttrMultiProcessorCount:
            *value = device;
            return cudaSuccess;
        default:
            return cudaErrorInvalidValue;
    }
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > int{emulator::kMaxSharedBytes})
        return cudaErrorInvalidValue;
    emulator::allowed_dynamic_bytes[kernel] = value;
    return cudaSuccess;
}

cudaError_t cudaMemset2DAsync(void* target, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
    for (size_t row = 0; row < height; ++row) memset(static_cast<char*>(target) + row * pitch, value, width);
    return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure ? emulator::failure() : "invalid value";
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** entry, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
    const bool is_it = strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
    *entry = is_it ? reinterpret_cast<void*>(emulator::encode_tiled) : nullptr;
    *found = is_it ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

}  // extern "C"
