// K-grouped FP8 GEMM, fine-grained scaling of both operands' rows:   d[i] = (a * sfa)[:, K_i] @ (b * sfb)[:, K_i].T
// (+ d[i]), where the columns K_i of group i lie between k_offsets[i] and k_offsets[i + 1]
//
//   a    [m, k]           e4m3, K-major          TMA, 128-byte swizzle
//   b    [n, k]           e4m3, K-major          TMA, 128-byte swizzle
//   sfa  [m, k/128]       f32, any strides       TMA where both are MN-major and aligned, else cp.async
//   sfb  [n, k/128]       f32, any strides       as sfa
//   d    [groups, m, n]   bf16 or f32            TMA store, or straight from registers
//
// Tile      Shape's; persistent, group by group, by rasterize within a group.
// Roles     warpgroups 0 .. kNumMathWarpgroups - 1: 64 rows each: WGMMA, promotion, epilogue.
//           the last warpgroup: its first warp loads a and b, its second the scales.
// Barriers  full[stage]: 1 arrival with the bytes of a and b, and for the scales 1 with theirs or 32 of cp.async.
//           empty[stage]: one arrival of each math warp.   named 1 + warpgroup: the epilogue's own 128 threads.
// Shared    KGroupedFp8GemmShared below.
// Numerics  WGMMA accumulates 128 of K in its own precision; float32 registers take that times (sfa * sfb)
//           (promote.cuh), in ascending order of k: a group's bits depend on nothing but its columns.
// Limits    k % 128 == 0, n % 8 == 0, any m >= 1. TMA fills what is outside with zeros and cuts off the store.
//           Offsets are read on the device and not trusted (k_group_scheduler.cuh). No columns: zeros, or d as it is.
// Source    DeepSeek-V3 report, arXiv:2412.19437, section 3.3.   Launched by launch/k_grouped_fp8_gemm.cu.
//           docs/grouped_gemm.md
#pragma once

#include "device/k_group_scheduler.cuh"
#include "device/multiply.cuh"
#include "device/pipeline.cuh"
#include "device/promote.cuh"
#include "device/store_tile.cuh"
#include "device/tile.cuh"
#include "kernels/k_grouped_fp8_gemm_arguments.h"
#include "ptx/cp_async.cuh"
#include "ptx/shared_memory.cuh"

namespace dso {

/// The one tile that is compiled.
struct KGroupedFp8GemmShape {
    static constexpr int kNumMathWarpgroups = 3, kNumStages = 4;
    static constexpr int BLOCK_M = 64 * kNumMathWarpgroups, BLOCK_N = 128, BLOCK_K = 128;
    static constexpr int kNumThreads = 128 * (kNumMathWarpgroups + 1);
    static constexpr int kProducerRegisters = 56, kMathRegisters = 152;

    using Scheduler = KGroupScheduler<BLOCK_M, BLOCK_N, BLOCK_K>;
};

template <typename Shape>
struct KGroupedFp8GemmShared {
    alignas(kSwizzleAtomBytes) uint8_t a[Shape::kNumStages][Shape::BLOCK_M * Shape::BLOCK_K];
    alignas(kSwizzleAtomBytes) uint8_t b[Shape::kNumStages][Shape::BLOCK_N * Shape::BLOCK_K];
    alignas(kSwizzleAtomBytes) uint8_t panels[Shape::kNumMathWarpgroups][Shape::BLOCK_N / 64][64 * kSwizzleBytes];
    alignas(128) float sfa[Shape::kNumStages][Shape::BLOCK_M];  // TMA writes to multiples of 128
    alignas(128) float sfb[Shape::kNumStages][Shape::BLOCK_N];
    alignas(8) Pipeline<Shape::kNumStages> pipeline;
};

/// A loading warp's whole life: `load(full, stage, tile, k_block)` starts a step's copies.
template <typename Shape, typename Load>
DSO_DEVICE void k_grouped_produce(KGroupedFp8GemmShared<Shape>& shared, const KGroupSchedule& schedule,
                                  const Load& load) {
    typename Shape::Scheduler scheduler(schedule, blockIdx.x, gridDim.x);
    typename Pipeline<Shape::kNumStages>::State state;
    for (KGroupTile tile; scheduler.next(tile);) {
        for (int k_block = tile.first_k_block; k_block < tile.last_k_block; ++k_block, state.advance()) {
            shared.pipeline.acquire(state);
            load(&shared.pipeline.full[state.stage], state.stage, tile, k_block);
        }
    }
}

/// Asks for what d holds of a tile, so that the epilogue need not wait for memory.
template <typename Shape>
DSO_DEVICE void prefetch_output(const DirectOutput& output, const KGroupSchedule& schedule, const KGroupTile& tile) {
    const int element = output.is_bf16 ? 2 : 4, column = tile.n_block * Shape::BLOCK_N;
    const int row_bytes = min(Shape::BLOCK_N, schedule.n - column) * element;
    const int last_row = min((tile.m_block + 1) * Shape::BLOCK_M, schedule.m);
    for (int row = tile.m_block * Shape::BLOCK_M + threadIdx.x % 32; row < last_row; row += 32) {
        const int64_t offset = tile.group * output.stride_matrix + row * output.stride + column;
        ptx::prefetch_to_l2(static_cast<const uint8_t*>(output.d) + offset * element, row_bytes);
    }
}

template <typename Shape>
DSO_DEVICE void k_grouped_load_operands(KGroupedFp8GemmShared<Shape>& shared, const KGroupedFp8GemmMaps& maps,
                                        const KGroupSchedule& schedule, const DirectOutput& output) {
    k_grouped_produce<Shape>(shared, schedule, [&](uint64_t* full, int stage, const KGroupTile& tile, int k_block) {
        if (output.accumulate && k_block == tile.first_k_block) prefetch_output<Shape>(output, schedule, tile);
        if (!ptx::elect_one()) return;
        ptx::mbarrier_arrive_expect_tx(full, (Shape::BLOCK_M + Shape::BLOCK_N) * Shape::BLOCK_K);
        ptx::tma_load_3d(shared.a[stage], &maps.a, full, k_block * Shape::BLOCK_K, tile.m_block * Shape::BLOCK_M, 0);
        ptx::tma_load_3d(shared.b[stage], &maps.b, full, k_block * Shape::BLOCK_K, tile.n_block * Shape::BLOCK_N, 0);
    });
}

template <typename Shape>
DSO_DEVICE void k_grouped_load_scales(KGroupedFp8GemmShared<Shape>& shared, const KGroupedFp8GemmMaps& maps,
                                      const KGroupSchedule& schedule) {
    k_grouped_produce<Shape>(shared, schedule, [&](uint64_t* full, int stage, const KGroupTile& tile, int k_block) {
        if (!ptx::elect_one()) return;
        ptx::mbarrier_arrive_expect_tx(full, (Shape::BLOCK_M + Shape::BLOCK_N) * static_cast<uint32_t>(sizeof(float)));
        ptx::tma_load_3d(shared.sfa[stage], &maps.sfa, full, tile.m_block * Shape::BLOCK_M, k_block, 0);
        ptx::tma_load_3d(shared.sfb[stage], &maps.sfb, full, tile.n_block * Shape::BLOCK_N, k_block, 0);
    });
}

/// `run[i] = scales of row first_row + i`, by all lanes; zero beyond the last row.
DSO_DEVICE void gather_scales(float* run, int length, const RowScales& scales, int first_row, int num_rows,
                              int k_block) {
    for (int i = threadIdx.x % 32; i < length; i += 32) {
        const int row = min(first_row + i, num_rows - 1);
        ptx::cp_async_4(run + i, scales.base + row * scales.stride_row + k_block * scales.stride_k,
                        first_row + i < num_rows);
    }
}

template <typename Shape>
DSO_DEVICE void k_grouped_gather_scales(KGroupedFp8GemmShared<Shape>& shared,
                                        const KGroupedFp8GemmArguments& arguments) {
    const KGroupSchedule& schedule = arguments.schedule;
    k_grouped_produce<Shape>(shared, schedule, [&](uint64_t* full, int stage, const KGroupTile& tile, int k_block) {
        gather_scales(shared.sfa[stage], Shape::BLOCK_M, arguments.sfa, tile.m_block * Shape::BLOCK_M, schedule.m,
                      k_block);
        gather_scales(shared.sfb[stage], Shape::BLOCK_N, arguments.sfb, tile.n_block * Shape::BLOCK_N, schedule.n,
                      k_block);
        ptx::cp_async_mbarrier_arrive(full);
    });
}

/// A math warpgroup's whole life: a tile's steps, then its epilogue.
template <typename Shape>
DSO_DEVICE void k_grouped_consume(KGroupedFp8GemmShared<Shape>& shared, const TensorMap* map_d,
                                  const KGroupSchedule& schedule, const DirectOutput& output, int warpgroup) {
    constexpr int kNumSums = Shape::BLOCK_N / 2;
    const int lane = threadIdx.x % 32, first_row = warpgroup * 64;  // within the tile
    const int scale_row = first_row + threadIdx.x % 128 / 32 * 16 + lane / 4;
    RingDescriptor<Shape::kNumStages, sizeof(shared.a[0])> a(shared.a[0] + first_row * Shape::BLOCK_K);
    RingDescriptor<Shape::kNumStages, sizeof(shared.b[0])> b(shared.b[0]);
    typename Shape::Scheduler scheduler(schedule, blockIdx.x, gridDim.x);
    typename Pipeline<Shape::kNumStages>::State state;

    for (KGroupTile tile; scheduler.next(tile);) {
        float partial[kNumSums], sum[kNumSums];
#pragma unroll
        for (int i = 0; i < kNumSums; ++i) sum[i] = 0.f;

        for (int k_block = tile.first_k_block; k_block < tile.last_k_block; ++k_block) {
            shared.pipeline.wait(state);
            start_multiply<Shape::BLOCK_N>(partial, a.get(), b.get());
            const float* sfa = &shared.sfa[state.stage][scale_row];
            const float upper = sfa[0], lower = sfa[8];
            finish_multiply(partial);
            promote_outer(sum, partial, upper, lower, &shared.sfb[state.stage][lane % 4 * 2]);
            ptx::fence_proxy_async_shared();  // the last scales may be on their way still
            __syncwarp();
            if (lane == 0) shared.pipeline.release(state);
            a.advance(state.stage);
            b.advance(state.stage);
            state.advance();
        }
        const TilePlace place{tile.group, tile.m_block * Shape::BLOCK_M + first_row, tile.n_block * Shape::BLOCK_N,
                              schedule.m, schedule.n};
        if (output.is_bf16 && !output.accumulate) {
            store_tile_by_tma(shared.panels[warpgroup], map_d, sum, 1 + warpgroup, place);
        } else if (!output.accumulate || tile.first_k_block < tile.last_k_block) {
            store_tile_direct(output, sum, place);
        }
    }
    if (threadIdx.x % 128 == 0) ptx::tma_store_wait_read<0>();  // shared memory must outlive the last store's reads
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kNumThreads, 1)
    sm90_k_grouped_fp8_gemm_kernel(const __grid_constant__ KGroupedFp8GemmMaps maps,
                                   const __grid_constant__ KGroupedFp8GemmArguments arguments,
                                   const __grid_constant__ DirectOutput output) {
    using Shared = KGroupedFp8GemmShared<Shape>;
    static_assert(sizeof(Shared) <= 232448, "more shared memory than a CTA can have");
    auto& shared = ptx::dynamic_shared<Shared>();
    // The same value in the whole warp, and the compiler must know it: roles are branches, not predicates.
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);
    constexpr int kProducerWarp = 4 * Shape::kNumMathWarpgroups;

    if (warp == kProducerWarp) {
        if (threadIdx.x % 32 == 0) {
            ptx::prefetch_tensor_map(&maps.a);
            ptx::prefetch_tensor_map(&maps.b);
            shared.pipeline.init(1 + (arguments.scales_by_tma ? 1 : 32), kProducerWarp);
        }
    }
    __syncthreads();

    if (warp >= kProducerWarp) {
        ptx::setmaxnreg_dec<Shape::kProducerRegisters>();
        if (warp == kProducerWarp) {
            k_grouped_load_operands<Shape>(shared, maps, arguments.schedule, output);
        } else if (warp == kProducerWarp + 1) {
            if (arguments.scales_by_tma) {
                k_grouped_load_scales<Shape>(shared, maps, arguments.schedule);
            } else {
                k_grouped_gather_scales<Shape>(shared, arguments);
            }
        }
    } else {
        ptx::setmaxnreg_inc<Shape::kMathRegisters>();
        k_grouped_consume<Shape>(shared, &maps.d, arguments.schedule, output, warp / 4);
    }
}

}  // namespace dso
