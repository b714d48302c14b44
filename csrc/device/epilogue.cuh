// From accumulators to the output, for the 64 rows of one math warpgroup.
#pragma once

#include "device/direct_output.h"
#include "device/tile.cuh"
#include "ptx/matrix.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"

namespace dso {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWarpgroupRows = 64;

/// What an epilogue needs to know of its place in the output.
struct OutputTile {
    int row, column;  // of the warpgroup's first element
    int m, n;         // the output's extents
};

/// Rounds to bfloat16 and stores through shared memory by TMA, which cuts off what lies beyond the output. The store
/// runs on while the warpgroup computes its next tile: the staging buffer is waited for only before its next use.
template <int BLOCK_N>
struct TmaBf16Epilogue {
    static constexpr int kPanelColumns = kSwizzleBytes / 2;  // 64 columns: a swizzled row
    static constexpr int kNumPanels = BLOCK_N / kPanelColumns;
    static_assert(BLOCK_N % kPanelColumns == 0, "the staging buffer is made of panels of 64 columns");

    struct alignas(kSwizzleAtomBytes) Shared {
        uint8_t panels[kNumPanels][kWarpgroupRows * kSwizzleBytes];
    };

    DSO_DEVICE static void store(const float (&sum)[BLOCK_N / 2], const OutputTile& at, const TensorMap* map_d,
                                 const DirectOutput&, Shared& shared, int warpgroup) {
        const uint32_t thread = threadIdx.x % kWarpgroupThreads, warp = thread / 32, lane = thread % 32;
        const uint32_t barrier = 1 + warpgroup;  // 0 is __syncthreads

        if (thread == 0) ptx::tma_store_wait_read<0>();  // the previous tile has left the staging buffer
        ptx::named_barrier_sync(barrier, kWarpgroupThreads);

        // Each stmatrix takes 16 columns of the warp's 16 rows; see its lane-to-row rule.
        const uint32_t row = warp * 16 + lane % 16;
#pragma unroll
        for (int j = 0; j < BLOCK_N / 16; ++j) {
            const uint32_t chunk = 2 * (j % 4) + lane / 16;
            ptx::stmatrix_x4(
                &shared.panels[j / 4][swizzled_offset(row, chunk)], ptx::pack_bf16x2(sum[8 * j + 0], sum[8 * j + 1]),
                ptx::pack_bf16x2(sum[8 * j + 2], sum[8 * j + 3]), ptx::pack_bf16x2(sum[8 * j + 4], sum[8 * j + 5]),
                ptx::pack_bf16x2(sum[8 * j + 6], sum[8 * j + 7]));
        }
        ptx::fence_proxy_async_shared();
        ptx::named_barrier_sync(barrier, kWarpgroupThreads);

        if (thread == 0) {
#pragma unroll
            for (int panel = 0; panel < kNumPanels; ++panel) {
                const int column = at.column + panel * kPanelColumns;
                if (at.row < at.m && column < at.n) ptx::tma_store_2d(map_d, shared.panels[panel], column, at.row);
            }
            ptx::tma_store_commit();
        }
    }

    /// Before the CTA ends: shared memory must outlive the reads of the last store.
    DSO_DEVICE static void finish() {
        if (threadIdx.x % kWarpgroupThreads == 0) ptx::tma_store_wait_read<0>();
    }
};

/// Stores, or adds, float32 or bfloat16 straight from registers.
template <int BLOCK_N>
struct DirectEpilogue {
    struct Shared {};

    DSO_DEVICE static void store(const float (&sum)[BLOCK_N / 2], const OutputTile& at, const TensorMap*,
                                 const DirectOutput& output, Shared&, int) {
        const int thread = threadIdx.x % kWarpgroupThreads, warp = thread / 32, lane = thread % 32;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = at.row + warp * 16 + lane / 4 + 8 * half;
            if (row >= at.m) continue;
            const int64_t first = row * output.stride;
#pragma unroll
            for (int j = 0; j < BLOCK_N / 8; ++j) {
                const int column = at.column + 8 * j + 2 * (lane % 4);
                if (column >= at.n) continue;  // n is even: a pair is inside or outside as a whole
                float2 value = {sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1]};
                if (output.is_bf16) {
                    auto* d = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(output.d) + first + column);
                    if (output.accumulate) {
                        const uint32_t old = *d;
                        value.x += __uint_as_float(old << 16);
                        value.y += __uint_as_float(old & 0xFFFF0000u);
                    }
                    *d = ptx::pack_bf16x2(value.x, value.y);
                } else {
                    auto* d = reinterpret_cast<float2*>(static_cast<float*>(output.d) + first + column);
                    if (output.accumulate) {
                        const float2 old = *d;
                        value.x += old.x;
                        value.y += old.y;
                    }
                    *d = value;
                }
            }
        }
    }

    DSO_DEVICE static void finish() {}
};

}  // namespace dso
