// FP8 GEMM with fine-grained scaling:   d = (a * sfa) @ (b * sfb).T   (+ d)
//
//   a    [m, k]                      e4m3, K-major           TMA, 128-byte swizzle
//   b    [n, k]                      e4m3, K-major           TMA, 128-byte swizzle
//   sfa  [m, ceil(k/128)]            f32, any strides        cp.async by the producer warp, a float a row
//   sfb  [ceil(n/128), ceil(k/128)]  f32, any strides        the same, one float a tile
//   d    [m, n]                      bf16 or f32             Epilogue: TMA store, or straight from registers
//
// Tile      BLOCK_M x BLOCK_N x 128, BLOCK_M = 64 * kNumMathWarpgroups; a ring of kNumStages; persistent, tiles from
//           Scheduler::next. BLOCK_N divides 128, so one sfb serves a tile's whole step.
// Roles     warpgroups 0 .. kNumMathWarpgroups - 1: 64 rows each: WGMMA, promotion, epilogue.
//           the last warpgroup: its first warp is the producer; it gives its registers to the others.
// Barriers  full[stage]:  1 arrival with (A + B) bytes, and 32 of cp.async (one a lane).  Parity: phase.
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
#include "device/scheduler.cuh"
#include "device/tile.cuh"
#include "kernels/fp8_gemm_arguments.h"
#include "ptx/cp_async.cuh"
#include "ptx/wgmma.cuh"

namespace dso {

inline constexpr int kBlockK = 128;      // of K: a swizzled row, and the extent of a scale
inline constexpr int kScaleBlock = 128;  // rows and columns of B that share a scale

template <int kNumMathWarpgroups, int BLOCK_N, int kNumStages, typename Epilogue>
struct Fp8GemmShared {
    static constexpr int BLOCK_M = kNumMathWarpgroups * kWarpgroupRows;

    alignas(kSwizzleAtomBytes) uint8_t a[kNumStages][BLOCK_M * kBlockK];
    alignas(kSwizzleAtomBytes) uint8_t b[kNumStages][BLOCK_N * kBlockK];
    typename Epilogue::Shared epilogue[kNumMathWarpgroups];
    float sfa[kNumStages][BLOCK_M];
    float sfb[kNumStages];
    alignas(8) Pipeline<kNumStages> pipeline;
};

/// Registers a thread: of 65,536, as many for the math warpgroups as the producer leaves (multiples of 8).
template <int kNumMathWarpgroups>
struct Fp8GemmRegisters;
template <>
struct Fp8GemmRegisters<1> {
    static constexpr int kProducer = 40, kMath = 232;
};
template <>
struct Fp8GemmRegisters<2> {
    static constexpr int kProducer = 40, kMath = 232;
};
template <>
struct Fp8GemmRegisters<3> {
    static constexpr int kProducer = 32, kMath = 160;
};

/// The producer warp's whole life: keeps the ring filled.
template <int BLOCK_M, int BLOCK_N, int kNumStages, typename Scheduler, typename Shared>
DSO_DEVICE void fp8_gemm_produce(Scheduler scheduler, Shared& shared, const TensorMap* map_a, const TensorMap* map_b,
                                 const Fp8GemmArguments& arguments) {
    constexpr uint32_t kStageBytes = (BLOCK_M + BLOCK_N) * kBlockK;
    const int lane = threadIdx.x % 32;
    const int num_k_blocks = ceil_div(arguments.k, kBlockK);
    typename Pipeline<kNumStages>::State state;

    for (Tile tile; scheduler.next(tile);) {
        const int first_row = tile.m_block * BLOCK_M, first_column = tile.n_block * BLOCK_N;
        const float* sfb = arguments.sfb + first_column / kScaleBlock * arguments.sfb_stride_n;
        for (int k_block = 0; k_block < num_k_blocks; ++k_block, state.advance()) {
            shared.pipeline.acquire(state);
            uint64_t* full = &shared.pipeline.full[state.stage];
            if (lane == 0) {
                ptx::mbarrier_arrive_expect_tx(full, kStageBytes);
                ptx::tma_load_2d(shared.a[state.stage], map_a, full, k_block * kBlockK, first_row);
                ptx::tma_load_2d(shared.b[state.stage], map_b, full, k_block * kBlockK, first_column);
                ptx::cp_async_4(&shared.sfb[state.stage], sfb + k_block * arguments.sfb_stride_k, true);
            }
            const float* sfa = arguments.sfa + k_block * arguments.sfa_stride_k;
#pragma unroll
            for (int i = 0; i < BLOCK_M; i += 32) {
                const int row = first_row + i + lane;
                const bool inside = row < arguments.m;
                ptx::cp_async_4(&shared.sfa[state.stage][i + lane], sfa + (inside ? row * arguments.sfa_stride_m : 0),
                                inside);
            }
            ptx::cp_async_mbarrier_arrive(full);
        }
    }
}

/// One step of a math warpgroup: 64 x BLOCK_N x 128 on the tensor cores, then promotion.
template <int BLOCK_N, int kNumStages, typename Shared>
DSO_DEVICE void fp8_gemm_step(Shared& shared, const typename Pipeline<kNumStages>::State& state, uint64_t descriptor_a,
                              uint64_t descriptor_b, int row, float (&partial)[BLOCK_N / 2],
                              float (&sum)[BLOCK_N / 2]) {
    constexpr int kWgmmaK = 32;
    shared.pipeline.wait(state);
    const float sfb = shared.sfb[state.stage];
    const float upper = shared.sfa[state.stage][row] * sfb, lower = shared.sfa[state.stage][row + 8] * sfb;

    ptx::keep_in_order(partial);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK; k += kWgmmaK) {
        ptx::WgmmaE4M3<BLOCK_N>::mma(partial, advance_descriptor(descriptor_a, k), advance_descriptor(descriptor_b, k),
                                     k != 0);
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
template <int BLOCK_M, int BLOCK_N, int kNumStages, typename Epilogue, typename Scheduler, typename Shared>
DSO_DEVICE void fp8_gemm_consume(Scheduler scheduler, Shared& shared, const TensorMap* map_d,
                                 const Fp8GemmArguments& arguments, const DirectOutput& output, int warpgroup) {
    const int num_k_blocks = ceil_div(arguments.k, kBlockK);
    const int first_row = warpgroup * kWarpgroupRows;  // within the tile
    const int row = first_row + threadIdx.x % kWarpgroupThreads / 32 * 16 + threadIdx.x % 32 / 4;
    // Computing a descriptor between two WGMMAs costs 8 % (measured): one base, to which a step adds its stage.
    const uint64_t base_a = wgmma_descriptor(shared.a[0] + first_row * kBlockK);
    const uint64_t base_b = wgmma_descriptor(shared.b[0]);
    typename Pipeline<kNumStages>::State state;

    for (Tile tile; scheduler.next(tile);) {
        float partial[BLOCK_N / 2], sum[BLOCK_N / 2];
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i) sum[i] = 0.f;
        for (int k_block = 0; k_block < num_k_blocks; ++k_block, state.advance()) {
            fp8_gemm_step<BLOCK_N, kNumStages>(
                shared, state, advance_descriptor(base_a, state.stage * sizeof(shared.a[0])),
                advance_descriptor(base_b, state.stage * sizeof(shared.b[0])), row, partial, sum);
        }
        const OutputTile at{tile.m_block * BLOCK_M + first_row, tile.n_block * BLOCK_N, arguments.m, arguments.n};
        Epilogue::store(sum, at, map_d, output, shared.epilogue[warpgroup], warpgroup);
    }
    Epilogue::finish();
}

template <int kNumMathWarpgroups, int BLOCK_N, int kNumStages, typename Epilogue, typename Scheduler>
__global__ void __launch_bounds__((kNumMathWarpgroups + 1) * kWarpgroupThreads, 1)
    sm90_fp8_gemm_kernel(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
                         const __grid_constant__ TensorMap map_d, const __grid_constant__ Fp8GemmArguments arguments,
                         const __grid_constant__ DirectOutput output) {
    static_assert(BLOCK_N == 64 || BLOCK_N == 128, "one sfb a tile: BLOCK_N must divide the scale block");
    constexpr int BLOCK_M = kNumMathWarpgroups * kWarpgroupRows;
    using Shared = Fp8GemmShared<kNumMathWarpgroups, BLOCK_N, kNumStages, Epilogue>;
    using Registers = Fp8GemmRegisters<kNumMathWarpgroups>;
    static_assert(sizeof(Shared) <= 232448, "more shared memory than a CTA can have");
    static_assert(sizeof(Shared::a[0]) % kSwizzleAtomBytes == 0 && sizeof(Shared::b[0]) % kSwizzleAtomBytes == 0,
                  "every stage must start at a swizzle atom");

    extern __shared__ __align__(kSwizzleAtomBytes) uint8_t dynamic_shared[];
    auto& shared = *reinterpret_cast<Shared*>(dynamic_shared);
    // The same value in the whole warp, and the compiler must know it: roles are branches, not predicates.
    const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / kWarpgroupThreads, 0);
    const bool is_producer = warpgroup == kNumMathWarpgroups;

    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(&map_a);
        ptx::prefetch_tensor_map(&map_b);
        shared.pipeline.init(1 + 32, kNumMathWarpgroups * 4);
    }
    __syncthreads();

    const Scheduler scheduler(ceil_div(arguments.m, BLOCK_M), ceil_div(arguments.n, BLOCK_N), blockIdx.x, gridDim.x);
    if (is_producer) {
        ptx::setmaxnreg_dec<Registers::kProducer>();
        if (threadIdx.x % kWarpgroupThreads / 32 == 0) {
            fp8_gemm_produce<BLOCK_M, BLOCK_N, kNumStages>(scheduler, shared, &map_a, &map_b, arguments);
        }
    } else {
        ptx::setmaxnreg_inc<Registers::kMath>();
        fp8_gemm_consume<BLOCK_M, BLOCK_N, kNumStages, Epilogue>(scheduler, shared, &map_d, arguments, output,
                                                                 warpgroup);
    }
}

}  // namespace dso
