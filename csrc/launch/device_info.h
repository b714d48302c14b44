#pragma once

#include "launch/deepseek_kernels.h"

namespace dso {

/// The calling thread's current device and its number of SMs (cached); DSO_NO_KERNEL where it is no Hopper GPU.
dso_status current_device(int* device, int* num_sms);

}  // namespace dso
