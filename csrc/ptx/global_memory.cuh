// Global memory between CTAs.
// PTX ISA, section "Data Movement and Conversion Instructions: ld, st", and "Memory Consistency Model".
#pragma once

#include "ptx/types.cuh"

namespace dso::ptx {

/// `ld.acquire.gpu`: what was written before the `store_release` whose value this reads can be seen afterwards.
DSO_DEVICE uint64_t load_acquire(const uint64_t* address) {
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

/// Reads until `value` is there.
DSO_DEVICE void wait_for_release(const uint64_t* address, uint64_t value) {
    while (load_acquire(address) != value) {
    }
}

/// `st.release.gpu`: after all that this thread, and those that it has waited for, wrote.
DSO_DEVICE void store_release(uint64_t* address, uint64_t value) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

}  // namespace dso::ptx
