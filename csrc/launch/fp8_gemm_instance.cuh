// The body behind one line of fp8_gemm_configs.def: CMake writes a .cu of two lines for each, to compile in parallel.
#pragma once

#include "kernels/sm90_fp8_gemm.cuh"
#include "launch/fp8_gemm.h"
#include "launch/fp8_gemm_config.h"
#include "launch/launch.h"

namespace dso {
namespace {

template <int kNumMathWarpgroups, int BLOCK_N, int kNumStages, typename Epilogue>
dso_status launch_with(const Fp8GemmLaunch& launch) {
    constexpr Fp8GemmConfig config{kNumMathWarpgroups, BLOCK_N, kNumStages};
    constexpr int shared_bytes = sizeof(Fp8GemmShared<kNumMathWarpgroups, BLOCK_N, kNumStages, Epilogue>);
    static_assert(shared_bytes <= config.shared_bytes(), "Fp8GemmConfig::shared_bytes is what the planner checks");
    constexpr auto kernel = sm90_fp8_gemm_kernel<kNumMathWarpgroups, BLOCK_N, kNumStages, Epilogue, DenseScheduler>;

    const int64_t num_tiles = DenseScheduler::num_tiles(ceil_div(launch.arguments.m, config.block_m()),
                                                        ceil_div(launch.arguments.n, BLOCK_N));
    const int grid = num_tiles < launch.num_sms ? static_cast<int>(num_tiles) : launch.num_sms;
    DSO_TRY(allow_shared_memory<kernel>(launch.device, shared_bytes));
    kernel<<<grid, config.num_threads(), shared_bytes, static_cast<cudaStream_t>(launch.stream)>>>(
        launch.map_a, launch.map_b, launch.map_d, launch.arguments, launch.output);
    DSO_CUDA(cudaGetLastError());
    return DSO_OK;
}

}  // namespace

template <int kNumMathWarpgroups, int BLOCK_N, int kNumStages>
dso_status launch_fp8_gemm(const Fp8GemmLaunch& launch) {
    return launch.stores_by_tma ? launch_with<kNumMathWarpgroups, BLOCK_N, kNumStages, TmaBf16Epilogue<BLOCK_N>>(launch)
                                : launch_with<kNumMathWarpgroups, BLOCK_N, kNumStages, DirectEpilogue<BLOCK_N>>(launch);
}

}  // namespace dso
