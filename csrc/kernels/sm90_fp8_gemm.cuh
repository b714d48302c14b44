// FP8 GEMM with fine-grained scaling:   d = (a * sfa) @ (b * sfb).T   (+ d)
//
//   a    [m, k]                      e4m3, K-major           TMA, 128-byte swizzle
//   b    [n, k]                      e4m3, K-major           TMA, 128-byte swizzle
//   sfa  [m, ceil(k/128)]            f32, any strides        Scales: TMA where MN-major and aligned, else cp.async
//   sfb  [ceil(n/128), ceil(k/128)]  f32, any strides        cp.async, one float a tile and step
//   d    [m, n]                      bf16 or f32             Epilogue: TMA store, or straight from registers
//
// Tile      BLOCK_M x BLOCK_N x 128, BLOCK_M = 64 * kNumMathWarpgroups; a ring of kNumStages; persistent, tiles from
//           Scheduler::next. BLOCK_N divides 128, so one sfb serves a tile's whole step.
// Roles     warpgroups 0 .. kNumMathWarpgroups - 1: 64 rows each: WGMMA, promotion, epilogue.
//           the last warpgroup: its first warp is the producer; it gives its registers to the others.
// Barriers  full[stage]:  1 arrival with the bytes of TMA, and those of cp.async (scale_loader.cuh).  Parity: phase.
//           empty[stage]: one arrival of each math warp.  Parity: phase ^ 1.
//           named 1 + warpgroup: the epilogue's own 128 threads.
// Shared    Fp8GemmShared below; static_assert keeps it within 232,448 bytes.
// Numerics  WGMMA accumulates 128 of K in its own precision; float32 registers take that times sfa * sfb (promote.cuh).
//           The order of additions depends on k alone, not on the tile, the CTA or the other rows.
// Limits    k % 16 == 0, n % 8 == 0, any m >= 1. TMA fills what is outside with zeros and cuts off the store.
// Source    DeepSeek-V3 report, arXiv:2412.19437, section 3.3.   Launched by launch/fp8_gemm.cu.   docs/fp8_gemm.md
#pragma once

#include "device/epilogue.cuh"
#include "device/pipeline.cuh"
#include "device/promote.cuh"
#include "device/scale_loader.cuh"
#include "device/scheduler.cuh"
#include "device/tile.cuh"
#include "kernels/fp8_gemm_arguments.h"
#include "ptx/wgmma.cuh"

namespace dso {

inline constexpr int kBlockK = 128;      // of K: a swizzled row, and the extent of a scale
inline constexpr int kScaleBlock = 128;  // rows and columns of B that share a scale

/// One line of launch/fp8_gemm_configs.def, for the compiler.
template <int kNumMathWarpgroups_, int BLOCK_N_, int kNumStages_>
struct Fp8GemmShape {
    static constexpr int kNumMathWarpgroups = kNumMathWarpgroups_, kNumStages = kNumStages_;
    static constexpr int BLOCK_M = kNumMathWarpgroups * kWarpgroupRows, BLOCK_N = BLOCK_N_;
    static constexpr int kNumThreads = (kNumMathWarpgroups + 1) * kWarpgroupThreads;

    // Registers a thread, of 65,536 in all: what the producer needs, and as many as the math warpgroups can have.
    static constexpr int kProducerRegisters = 56;
    static constexpr int kMathRegisters = kNumMathWarpgroups == 3 ? 152 : 224;

    static_assert(BLOCK_N == 64 || BLOCK_N == 128, "one sfb a tile: BLOCK_N must divide the scale block");
    static_assert(kNumMathWarpgroups <= 3,
                  "more math warpgroups leave too few registers for 64 x 128 sums and partials");
};

template <typename Shape, typename Epilogue>
struct Fp8GemmShared {
    alignas(kSwizzleAtomBytes) uint8_t a[Shape::kNumStages][Shape::BLOCK_M * kBlockK];
    alignas(kSwizzleAtomBytes) uint8_t b[Shape::kNumStages][Shape::BLOCK_N * kBlockK];
    typename Epilogue::Shared epilogue[Shape::kNumMathWarpgroups];
    alignas(128) float sfa[Shape::kNumStages][Shape::BLOCK_M];  // TMA writes to multiples of 128 bytes
    float sfb[Shape::kNumStages];
    alignas(8) Pipeline<Shape::kNumStages> pipeline;
};

/// The producer warp's whole life: keeps the ring filled.
template <typename Shape, typename Scales, typename Scheduler, typename Shared>
DSO_DEVICE void fp8_gemm_produce(Scheduler scheduler, Shared& shared, const Fp8GemmMaps& maps,
                                 const Fp8GemmArguments& arguments) {
    constexpr uint32_t kStageBytes = (Shape::BLOCK_M + Shape::BLOCK_N) * kBlockK + Scales::kNumBytes;
    const int lane = threadIdx.x % 32;
    const int num_k_blocks = ceil_div(arguments.k, kBlockK);
    typename Pipeline<Shape::kNumStages>::State state;

    for (Tile tile; scheduler.next(tile);) {
        const int first_row = tile.m_block * Shape::BLOCK_M, first_column = tile.n_block * Shape::BLOCK_N;
        StepScales scales{&maps.sfa,
                          arguments.sfa,
                          arguments.sfa_stride_m,
                          arguments.sfb + first_column / kScaleBlock * arguments.sfb_stride_n,
                          first_row,
                          0,
                          arguments.m};
        for (; scales.k_block < num_k_blocks; ++scales.k_block, state.advance()) {
            shared.pipeline.acquire(state);
            uint64_t* full = &shared.pipeline.full[state.stage];
            if (lane == 0) {
                const int column = scales.k_block * kBlockK;
                ptx::mbarrier_arrive_expect_tx(full, kStageBytes);
                ptx::tma_load_2d(shared.a[state.stage], &maps.a, full, column, first_row);
                ptx::tma_load_2d(shared.b[state.stage], &maps.b, full, column, first_column);
            }
            Scales::load(shared.sfa[state.stage], &shared.sfb[state.stage], full, scales, lane);
            scales.sfa += arguments.sfa_stride_k;
            scales.sfb += arguments.sfb_stride_k;
        }
    }
}

/// One step of a math warpgroup: 64 x BLOCK_N x 128 on the tensor cores, then promotion.
template <typename Shape, typename Shared>
DSO_DEVICE void fp8_gemm_step(Shared& shared, const typename Pipeline<Shape::kNumStages>::State& state,
                              uint64_t descriptor_a, uint64_t descriptor_b, int row,
                              float (&partial)[Shape::BLOCK_N / 2], float (&sum)[Shape::BLOCK_N / 2]) {
    constexpr int kWgmmaK = 32;
    shared.pipeline.wait(state);
    const float sfb = shared.sfb[state.stage];
    const float upper = shared.sfa[state.stage][row] * sfb, lower = shared.sfa[state.stage][row + 8] * sfb;

    ptx::keep_in_order(partial);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK; k += kWgmmaK) {
        ptx::WgmmaE4M3<Shape::BLOCK_N>::mma(partial, advance_descriptor(descriptor_a, k),
                                            advance_descriptor(descriptor_b, k), k != 0);
    }
    ptx::wgmma_commit();
    ptx::keep_in_order(partial);
    ptx::wgmma_wait<0>();
    ptx::keep_in_order(partial);

    __syncwarp();  // every lane has read its scales
    if (threadIdx.x % 32 == 0) shared.pipeline.release(state);
    promote(sum, partial, upper, lower);
}

/// A math warpgroup's whole life: a tile's steps, then its epilogue.
template <typename Shape, typename Epilogue, typename Scheduler, typename Shared>
DSO_DEVICE void fp8_gemm_consume(Scheduler scheduler, Shared& shared, const TensorMap* map_d,
                                 const Fp8GemmArguments& arguments, const DirectOutput& output, int warpgroup) {
    const int num_k_blocks = ceil_div(arguments.k, kBlockK);
    const int first_row = warpgroup * kWarpgroupRows;  // within the tile
    const int row = first_row + threadIdx.x % kWarpgroupThreads / 32 * 16 + threadIdx.x % 32 / 4;
    // Nothing should be computed between two WGMMAs: one base, to which a step adds its stage.
    const uint64_t base_a = wgmma_descriptor(shared.a[0] + first_row * kBlockK);
    const uint64_t base_b = wgmma_descriptor(shared.b[0]);
    typename Pipeline<Shape::kNumStages>::State state;

    for (Tile tile; scheduler.next(tile);) {
        float partial[Shape::BLOCK_N / 2], sum[Shape::BLOCK_N / 2];
#pragma unroll
        for (int i = 0; i < Shape::BLOCK_N / 2; ++i) sum[i] = 0.f;
        for (int k_block = 0; k_block < num_k_blocks; ++k_block, state.advance()) {
            fp8_gemm_step<Shape>(shared, state, advance_descriptor(base_a, state.stage * sizeof(shared.a[0])),
                                 advance_descriptor(base_b, state.stage * sizeof(shared.b[0])), row, partial, sum);
        }
        const OutputTile at{tile.m_block * Shape::BLOCK_M + first_row, tile.n_block * Shape::BLOCK_N, arguments.m,
                            arguments.n};
        Epilogue::store(sum, at, map_d, output, shared.epilogue[warpgroup], warpgroup);
    }
    Epilogue::finish();
}

template <typename Shape, typename Scales, typename Epilogue, typename Scheduler>
__global__ void __launch_bounds__(Shape::kNumThreads, 1)
    sm90_fp8_gemm_kernel(const __grid_constant__ Fp8GemmMaps maps, const __grid_constant__ Fp8GemmArguments arguments,
                         const __grid_constant__ DirectOutput output) {
    using Shared = Fp8GemmShared<Shape, Epilogue>;
    static_assert(sizeof(Shared) <= 232448, "more shared memory than a CTA can have");

    extern __shared__ __align__(kSwizzleAtomBytes) uint8_t dynamic_shared[];
    auto& shared = *reinterpret_cast<Shared*>(dynamic_shared);
    // The same value in the whole warp, and the compiler must know it: roles are branches, not predicates.
    const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / kWarpgroupThreads, 0);
    const bool is_producer = warpgroup == Shape::kNumMathWarpgroups;

    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(&maps.a);
        ptx::prefetch_tensor_map(&maps.b);
        shared.pipeline.init(1 + Scales::kNumArrivals, Shape::kNumMathWarpgroups * 4);
    }
    __syncthreads();

    const Scheduler scheduler(ceil_div(arguments.m, Shape::BLOCK_M), ceil_div(arguments.n, Shape::BLOCK_N), blockIdx.x,
                              gridDim.x);
    if (is_producer) {
        ptx::setmaxnreg_dec<Shape::kProducerRegisters>();
        if (threadIdx.x % kWarpgroupThreads / 32 == 0) {
            fp8_gemm_produce<Shape, Scales>(scheduler, shared, maps, arguments);
        }
    } else {
        ptx::setmaxnreg_inc<Shape::kMathRegisters>();
        fp8_gemm_consume<Shape, Epilogue>(scheduler, shared, &maps.d, arguments, output, warpgroup);
    }
}

}  // namespace dso
