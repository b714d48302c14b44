#pragma once

#include "ptx/types.cuh"

namespace emulator {

/// The CTA's dynamic shared memory, of which `num_bytes` are used.
void* dynamic_shared(size_t num_bytes);
/// The CTA's static variable with this key, which is made at its first use.
void* static_shared(const void* key, size_t num_bytes, size_t alignment);

}  // namespace emulator

namespace dso::ptx {

template <typename T>
T& dynamic_shared() {
    return *static_cast<T*>(emulator::dynamic_shared(sizeof(T)));
}

template <typename T>
T& static_shared() {
    static const char key = 0;
    return *static_cast<T*>(emulator::static_shared(&key, sizeof(T), alignof(T)));
}

}  // namespace dso::ptx
