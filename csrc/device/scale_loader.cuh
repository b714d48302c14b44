// How the scales of a stage reach shared memory: a float a row of A, and one for the tile of B.
#pragma once

#include "ptx/cp_async.cuh"
#include "ptx/tma.cuh"

namespace dso {

/// Where a step's scales lie in global memory.
struct StepScales {
    const TensorMap* map_sfa;  // [ceil(k / 128), m], for TmaScales
    const float* sfa;          // of the step, for GatherScales: row r at r * stride_m
    int64_t stride_m;
    const float* sfb;  // of the step and the tile
    int first_row, k_block, m;
};

/// sfa by TMA, where it is MN-major and each of its columns starts at a multiple of 16 bytes.
template <int BLOCK_M>
struct TmaScales {
    static constexpr int kNumArrivals = 1;  // at the full barrier: lane 0, when sfb is there
    static constexpr int kNumBytes = BLOCK_M * sizeof(float);

    DSO_DEVICE static void load(float* sfa, float* sfb, uint64_t* full, const StepScales& from, int lane) {
        if (lane != 0) return;
        ptx::tma_load_2d(sfa, from.map_sfa, full, from.first_row, from.k_block);
        ptx::cp_async_4(sfb, from.sfb, true);
        ptx::cp_async_mbarrier_arrive(full);
    }
};

/// sfa of any strides, float by float. The slower way (docs/fp8_gemm.md).
template <int BLOCK_M>
struct GatherScales {
    static constexpr int kNumArrivals = 32;  // at the full barrier: each lane, when its copies are there
    static constexpr int kNumBytes = 0;

    DSO_DEVICE static void load(float* sfa, float* sfb, uint64_t* full, const StepScales& from, int lane) {
        if (lane == 0) ptx::cp_async_4(sfb, from.sfb, true);
#pragma unroll
        for (int i = lane; i < BLOCK_M; i += 32) {
            const int row = from.first_row + i;
            const bool inside = row < from.m;
            ptx::cp_async_4(sfa + i, from.sfa + (inside ? row * from.stride_m : 0), inside);
        }
        ptx::cp_async_mbarrier_arrive(full);
    }
};

}  // namespace dso
