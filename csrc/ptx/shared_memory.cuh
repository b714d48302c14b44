// The CTA's shared memory, as objects.
#pragma once

#include "ptx/types.cuh"

namespace dso::ptx {

/// All of the dynamic shared memory. Its start is aligned to 1024 bytes, as the 128-byte swizzle wants its tiles.
template <typename T>
DSO_DEVICE T& dynamic_shared() {
    extern __shared__ __align__(1024) uint8_t dynamic_shared_bytes[];
    return *reinterpret_cast<T*>(dynamic_shared_bytes);
}

/// A variable in static shared memory, one of each type: give it a type of its own.
template <typename T>
DSO_DEVICE T& static_shared() {
    __shared__ T variable;
    return variable;
}

}  // namespace dso::ptx
