// The body behind one line of fp8_gemm_configs.def: CMake writes a .cu of two lines for each, to compile in parallel.
#pragma once

#include "kernels/sm90_fp8_gemm.cuh"
#include "launch/fp8_gemm.h"
#include "launch/fp8_gemm_config.h"
#include "launch/launch.h"

namespace dso {
namespace {

template <typename Shape, typename Scales, typename Epilogue>
dso_status launch_with(const Fp8GemmLaunch& launch) {
    constexpr Fp8GemmConfig config{Shape::kNumMathWarpgroups, Shape::BLOCK_N, Shape::kNumStages};
    constexpr int shared_bytes = sizeof(Fp8GemmShared<Shape, Epilogue>);
    static_assert(shared_bytes <= config.shared_bytes() && Shape::kNumThreads == config.num_threads(),
                  "the planner's view of a tile is the kernel's");
    constexpr auto kernel = sm90_fp8_gemm_kernel<Shape, Scales, Epilogue, DenseScheduler>;

    const int64_t num_tiles = DenseScheduler::num_tiles(ceil_div(launch.arguments.m, Shape::BLOCK_M),
                                                        ceil_div(launch.arguments.n, Shape::BLOCK_N));
    const int grid = num_tiles < launch.num_sms ? static_cast<int>(num_tiles) : launch.num_sms;
    DSO_TRY(allow_shared_memory<kernel>(launch.device, shared_bytes));
    return launch_kernel(kernel, {grid, Shape::kNumThreads, shared_bytes, launch.stream}, launch.maps, launch.arguments,
                         launch.output);
}

template <typename Shape, typename Scales>
dso_status launch_with_scales(const Fp8GemmLaunch& launch) {
    return launch.stores_by_tma ? launch_with<Shape, Scales, TmaBf16Epilogue<Shape::BLOCK_N>>(launch)
                                : launch_with<Shape, Scales, DirectEpilogue<Shape::BLOCK_N>>(launch);
}

}  // namespace

template <int kNumMathWarpgroups, int BLOCK_N, int kNumStages>
dso_status launch_fp8_gemm(const Fp8GemmLaunch& launch) {
    using Shape = Fp8GemmShape<kNumMathWarpgroups, BLOCK_N, kNumStages>;
    return launch.loads_scales_by_tma ? launch_with_scales<Shape, TmaScales<Shape::BLOCK_M>>(launch)
                                      : launch_with_scales<Shape, GatherScales<Shape::BLOCK_M>>(launch);
}

}  // namespace dso
