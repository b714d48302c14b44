// Global memory between CTAs.
// PTX ISA, section "Data Movement and Conversion Instructions: ld, st", and "Memory Consistency Model".
#pragma once

#include "ptx/types.cuh"

namespace dso::ptx {

/// `ld.acquire.gpu`, until `value` is there: what was written before the `store_release` of that value can then be
/// seen.
DSO_DEVICE void wait_for_release(const uint64_t* address, uint64_t value) {
    uint64_t found;
    do {
        asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(address) : "memory");
    } while (found != value);
}

/// `st.release.gpu`: after all that this thread, and those that it has waited for, wrote.
DSO_DEVICE void store_release(uint64_t* address, uint64_t value) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

}  // namespace dso::ptx
