// FP8 GEMM with fine-grained scaling, one dense output of many rows:   d = (a * sfa) @ (b * sfb).T
//
//   a    [m, k]                      e4m3, K-major          TMA, 128-byte swizzle
//   b    [n, k]                      e4m3, K-major          TMA, 128-byte swizzle
//   sfa  [m, ceil(k/128)]            f32, MN-major          TMA
//   sfb  [ceil(n/128), ceil(k/128)]  f32, any strides       cp.async, one float a tile and step
//   d    [m, n]                      bf16                   TMA store
//
// What sm90_fp8_gemm.cuh computes, bit for bit, where nothing but TMA is needed and every CTA's tiles are known
// beforehand: one loading warp, and no queue. Measured 2 to 5 % faster there (docs/fp8_gemm.md).
//
// Tile      Fp8GemmShape's; persistent, tiles by rasterize.
// Roles     warpgroups 0 .. kNumMathWarpgroups - 1: 64 rows each: WGMMA, promotion, epilogue.
//           the last warpgroup: its first warp is the producer; it gives its registers to the others.
// Barriers  full[stage]: 1 arrival with the bytes of TMA, 1 of cp.async.   empty[stage]: one arrival of each math warp.
//           named 1 + warpgroup: the epilogue's own 128 threads.
// Shared    Fp8GemmDenseShared below.
// Numerics  As sm90_fp8_gemm.cuh.
// Limits    k % 16 == 0, n % 8 == 0, m >= BLOCK_M. TMA fills what is outside with zeros and cuts off the store.
// Source    DeepSeek-V3 report, arXiv:2412.19437, section 3.3.   Launched by launch/fp8_gemm.cu.   docs/fp8_gemm.md
#pragma once

#include "device/store_tile.cuh"
#include "kernels/sm90_fp8_gemm.cuh"

namespace dso {

template <typename Shape>
struct Fp8GemmDenseShared {
    alignas(kSwizzleAtomBytes) uint8_t a[Shape::kNumStages][Shape::kMaxRows * Shape::BLOCK_K];
    alignas(kSwizzleAtomBytes) uint8_t b[Shape::kNumStages][Shape::BLOCK_N * Shape::BLOCK_K];
    alignas(kSwizzleAtomBytes) uint8_t panels[Shape::kNumMathWarpgroups][Shape::BLOCK_N / 64][64 * kSwizzleBytes];
    alignas(128) float sfa[Shape::kNumStages][Shape::kMaxRows];  // TMA writes to multiples of 128
    float sfb[Shape::kNumStages];
    alignas(8) Pipeline<Shape::kNumStages> pipeline;
};

/// The producer warp's whole life: keeps the ring filled.
template <typename Shape>
DSO_DEVICE void fp8_gemm_dense_produce(Fp8GemmDenseShared<Shape>& shared, const Fp8GemmMaps& maps,
                                       const Fp8GemmArguments& arguments, int num_m_blocks, int num_n_blocks) {
    constexpr uint32_t kStageBytes = (Shape::kMaxRows + Shape::BLOCK_N) * Shape::BLOCK_K + Shape::kMaxRows * 4;
    const int lane = threadIdx.x % 32, num_k_blocks = ceil_div(arguments.k, Shape::BLOCK_K);
    typename Pipeline<Shape::kNumStages>::State state;

    for (int next = blockIdx.x; next < num_m_blocks * num_n_blocks; next += gridDim.x) {
        const Tile tile = rasterize(next, num_m_blocks, num_n_blocks);
        const int first_row = tile.m_block * Shape::kMaxRows, first_column = tile.n_block * Shape::BLOCK_N;
        const float* sfb = arguments.sfb + first_column / 128 * arguments.sfb_stride_n;
        for (int k_block = 0; k_block < num_k_blocks; ++k_block, state.advance()) {
            shared.pipeline.acquire(state);
            uint64_t* full = &shared.pipeline.full[state.stage];
            if (lane == 0) {
                const int column = k_block * Shape::BLOCK_K;
                ptx::mbarrier_arrive_expect_tx(full, kStageBytes);
                ptx::tma_load_3d(shared.a[state.stage], &maps.a, full, column, first_row, 0);
                ptx::tma_load_3d(shared.b[state.stage], &maps.b, full, column, first_column, 0);
                ptx::tma_load_3d(shared.sfa[state.stage], &maps.sfa, full, first_row, k_block, 0);
                ptx::cp_async_4(&shared.sfb[state.stage], sfb, true);
                ptx::cp_async_mbarrier_arrive(full);
            }
            sfb += arguments.sfb_stride_k;
        }
    }
}

/// A math warpgroup's whole life: a tile's steps, then its epilogue.
template <typename Shape>
DSO_DEVICE void fp8_gemm_dense_consume(Fp8GemmDenseShared<Shape>& shared, const TensorMap* map_d,
                                       const Fp8GemmArguments& arguments, int num_m_blocks, int num_n_blocks,
                                       int warpgroup) {
    const int num_k_blocks = ceil_div(arguments.k, Shape::BLOCK_K), first_row = warpgroup * 64;  // within the tile
    const int scale_row = first_row + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    const uint64_t base_a = wgmma_descriptor(shared.a[0] + first_row * Shape::BLOCK_K);
    const uint64_t base_b = wgmma_descriptor(shared.b[0]);
    typename Pipeline<Shape::kNumStages>::State state;

    for (int next = blockIdx.x; next < num_m_blocks * num_n_blocks; next += gridDim.x) {
        const Tile tile = rasterize(next, num_m_blocks, num_n_blocks);
        float partial[Shape::BLOCK_N / 2], sum[Shape::BLOCK_N / 2];
#pragma unroll
        for (int i = 0; i < Shape::BLOCK_N / 2; ++i) sum[i] = 0.f;

        for (int k_block = 0; k_block < num_k_blocks; ++k_block, state.advance()) {
            const uint64_t a = advance_descriptor(base_a, state.stage * sizeof(shared.a[0]));
            const uint64_t b = advance_descriptor(base_b, state.stage * sizeof(shared.b[0]));
            shared.pipeline.wait(state);
            const float sfb = shared.sfb[state.stage];
            const float upper = shared.sfa[state.stage][scale_row] * sfb;
            const float lower = shared.sfa[state.stage][scale_row + 8] * sfb;
            start_multiply<Shape::BLOCK_N>(partial, a, b);
            finish_multiply(partial);
            __syncwarp();  // every lane has read its scales
            if (threadIdx.x % 32 == 0) shared.pipeline.release(state);
            promote(sum, partial, upper, lower);
        }
        store_tile_by_tma(shared.panels[warpgroup], map_d, sum, 1 + warpgroup,
                          {0, tile.m_block * Shape::kMaxRows + first_row, tile.n_block * Shape::BLOCK_N,
                           arguments.schedule.m, arguments.schedule.n});
    }
    if (threadIdx.x % 128 == 0) ptx::tma_store_wait_read<0>();  // shared memory must outlive the last store's reads
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kNumThreads, 1)
    sm90_fp8_gemm_dense_kernel(const __grid_constant__ Fp8GemmMaps maps,
                               const __grid_constant__ Fp8GemmArguments arguments,
                               const __grid_constant__ DirectOutput) {
    using Shared = Fp8GemmDenseShared<Shape>;
    static_assert(sizeof(Shared) <= 232448, "more shared memory than a CTA can have");
    auto& shared = ptx::dynamic_shared<Shared>();
    // The same value in the whole warp, and the compiler must know it: roles are branches, not predicates.
    const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);

    if (threadIdx.x < 32) {
        if (threadIdx.x == 0) {
            ptx::prefetch_tensor_map(&maps.a);
            ptx::prefetch_tensor_map(&maps.b);
        }
        shared.pipeline.init(threadIdx.x, 2, Shape::kNumStageWarps);
    }
    __syncthreads();
    ptx::grid_launch_dependents();

    const int num_m_blocks = ceil_div(arguments.schedule.m, Shape::kMaxRows);
    const int num_n_blocks = ceil_div(arguments.schedule.n, Shape::BLOCK_N);
    if (warpgroup == Shape::kNumMathWarpgroups) {
        ptx::setmaxnreg_dec<Shape::kProducerRegisters>();
        if (threadIdx.x % 128 / 32 == 0) {
            ptx::grid_dependency_wait();
            fp8_gemm_dense_produce<Shape>(shared, maps, arguments, num_m_blocks, num_n_blocks);
        }
    } else {
        ptx::setmaxnreg_inc<Shape::kMathRegisters>();
        fp8_gemm_dense_consume<Shape>(shared, &maps.d, arguments, num_m_blocks, num_n_blocks, warpgroup);
    }
}

}  // namespace dso
