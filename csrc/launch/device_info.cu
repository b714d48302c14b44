#include "launch/device_info.h"

#include <atomic>

#include "launch/cuda_check.h"

namespace dso {
namespace {

constexpr int kMaxDevices = 64;  // more are asked anew at each call

// 0: not asked yet; -1: no kernels for it; else its number of SMs. Two threads that ask at once store the same.
std::atomic<int> cached_num_sms[kMaxDevices];

dso_status ask_num_sms(int device, int* num_sms) {
    int major = 0, minor = 0;
    DSO_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    DSO_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    DSO_CUDA(cudaDeviceGetAttribute(num_sms, cudaDevAttrMultiProcessorCount, device));
    if (major != 9 || minor != 0) *num_sms = -1;
    return DSO_OK;
}

dso_status num_sms_of(int device, int* num_sms) {
    if (device < 0) {  // an undefined tensor's
        *num_sms = -1;
        return DSO_OK;
    }
    const bool cacheable = device < kMaxDevices;
    *num_sms = cacheable ? cached_num_sms[device].load(std::memory_order_relaxed) : 0;
    if (*num_sms == 0) {
        DSO_TRY(ask_num_sms(device, num_sms));
        if (cacheable) cached_num_sms[device].store(*num_sms, std::memory_order_relaxed);
    }
    return DSO_OK;
}

}  // namespace

dso_status current_device(int* device, int* num_sms) {
    DSO_CUDA(cudaGetDevice(device));
    DSO_TRY(num_sms_of(*device, num_sms));
    if (*num_sms < 0) return fail(DSO_NO_KERNEL, "the kernels are for compute capability 9.0 (Hopper)");
    return DSO_OK;
}

}  // namespace dso

extern "C" int dso_has_kernels_for(int device) {
    int num_sms = 0;
    return dso::num_sms_of(device, &num_sms) == DSO_OK && num_sms > 0;
}
