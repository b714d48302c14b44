// mbarrier: the barrier in shared memory that counts arrivals of threads and bytes of TMA.
// PTX ISA, section "Parallel Synchronization and Communication Instructions: mbarrier".
#pragma once

#include "ptx/types.cuh"

namespace dso::ptx {

/// The 32-bit shared-memory address that PTX instructions take.
DSO_DEVICE uint32_t smem_addr(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

/// `mbarrier.init`: a phase completes after `num_arrivals` arrivals and all bytes that were announced.
DSO_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(barrier)), "r"(num_arrivals) : "memory");
}

/// `fence.mbarrier_init`: makes initialised barriers visible to the asynchronous proxy and to the cluster.
DSO_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

/// `mbarrier.arrive`: one arrival; orders the thread's earlier accesses before the phase's end.
DSO_DEVICE void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_addr(barrier)) : "memory");
}

/// The same `count` times.
DSO_DEVICE void mbarrier_arrive_times(uint64_t* barrier, uint32_t count) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(barrier)), "r"(count) : "memory");
}

/// `mbarrier.arrive.expect_tx`: one arrival, and `num_bytes` more for TMA to deliver in this phase.
DSO_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(barrier)), "r"(num_bytes)
                 : "memory");
}

/// `mbarrier.try_wait.parity`: whether the phase of parity `parity` has completed, after a bounded sleep.
DSO_DEVICE bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.b32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(smem_addr(barrier)), "r"(parity)
        : "memory");
    return done;
}

/// Waits until the phase of parity `parity` has completed.
DSO_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    while (!mbarrier_try_wait(barrier, parity)) {
    }
}

}  // namespace dso::ptx
