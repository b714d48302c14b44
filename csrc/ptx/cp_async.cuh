// cp.async: small copies from global to shared memory by the threads themselves, completing asynchronously.
// PTX ISA, section "Data Movement and Conversion Instructions: cp.async".
#pragma once

#include "ptx/mbarrier.cuh"

namespace dso::ptx {

/// `cp.async.ca` of 4 bytes; where `valid` is false the destination is zeroed and `source` is not read.
DSO_DEVICE void cp_async_4(void* destination, const void* source, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_addr(destination)), "l"(source),
                 "r"(valid ? 4 : 0)
                 : "memory");
}

/// `cp.async.cg` of 16 bytes, past the first-level cache; likewise.
DSO_DEVICE void cp_async_16(void* destination, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_addr(destination)), "l"(source),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

/// `cp.async.mbarrier.arrive.noinc`: one of the barrier's expected arrivals, made when this thread's copies are done.
DSO_DEVICE void cp_async_mbarrier_arrive(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_addr(barrier)) : "memory");
}

/// `cp.async.commit_group`: this thread's copies since the last one become a group, which may be empty.
DSO_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// `cp.async.wait_group`: until all of this thread's groups but the last `kPending` are done. Other threads see the
/// bytes after a barrier.
template <int kPending>
DSO_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace dso::ptx
