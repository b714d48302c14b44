#pragma once

#include "ptx/types.cuh"

namespace dso::ptx {

uint32_t smem_addr(const void* pointer);
void mbarrier_init(uint64_t* barrier, uint32_t num_arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_arrive_times(uint64_t* barrier, uint32_t count);
void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t num_bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);

/// Its bounded sleep takes as long as the phase.
inline bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
    mbarrier_wait(barrier, parity);
    return true;
}

}  // namespace dso::ptx
