// Named barriers and register reallocation.
#pragma once

#include "ptx/types.cuh"

namespace dso::ptx {

/// `barrier.sync`: waits for `num_threads` threads at barrier `id` (0 is __syncthreads).
DSO_DEVICE void named_barrier_sync(uint32_t id, uint32_t num_threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

/// `setmaxnreg.inc`: this warpgroup takes `kRegisters` registers a thread, waiting until they are free.
template <int kRegisters>
DSO_DEVICE void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// `setmaxnreg.dec`: this warpgroup keeps `kRegisters` registers a thread.
template <int kRegisters>
DSO_DEVICE void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace dso::ptx
