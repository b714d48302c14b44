// A host stand-in for csrc/ptx/mbarrier.cuh: barriers with the hardware's phases, and warps as fibers that take turns
// in a random order. device/pipeline.cuh compiles against it unchanged.
#pragma once

#include <cstdint>

#define DSO_DEVICE inline

namespace dso::ptx {

void mbarrier_init(uint64_t* barrier, uint32_t num_arrivals);
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t num_bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
inline void fence_mbarrier_init() {}

}  // namespace dso::ptx
