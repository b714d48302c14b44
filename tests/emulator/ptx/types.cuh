// csrc/ptx/types.cuh for the emulator: device functions are ordinary ones.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#define DSO_DEVICE inline
#define DSO_HOST_DEVICE inline

namespace dso {

struct alignas(128) TensorMap {
    unsigned char opaque[128];
};

namespace ptx {

enum class HalfType { kBF16, kF16 };

}  // namespace ptx

}  // namespace dso
