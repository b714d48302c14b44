#pragma once

#include "ptx/types.cuh"

namespace emulator {

/// wgmma.mma_async.m64n`num_columns`k32 of e4m3, both operands K-major in shared memory, for the calling thread.
void multiply_e4m3(float* d, int num_columns, uint64_t a, uint64_t b, bool accumulate);

void wait_for_wgmma(size_t num_pending);

}  // namespace emulator

namespace dso::ptx {

void wgmma_fence();
void wgmma_commit();

template <int kPending>
void wgmma_wait() {
    emulator::wait_for_wgmma(kPending);
}

template <int kCount>
void keep_in_order(float (&)[kCount]) {}

template <int N>
struct WgmmaE4M3 {
    static constexpr int kNumAccumulators = N / 2;
    static void mma(float (&d)[kNumAccumulators], uint64_t a, uint64_t b, bool accumulate) {
        emulator::multiply_e4m3(d, N, a, b, accumulate);
    }
};

}  // namespace dso::ptx
