// The body behind one line of fp8_gemm_configs.def: CMake writes a .cu with that line for each, to compile in parallel.
#pragma once

#include "kernels/sm90_fp8_gemm.cuh"
#include "kernels/sm90_fp8_gemm_dense.cuh"
#include "kernels/sm90_fp8_gemm_swap_ab.cuh"
#include "launch/fp8_gemm.h"
#include "launch/fp8_gemm_config.h"
#include "launch/launch.h"

namespace dso {

template <auto kernel, typename Shared>
dso_status launch_fp8_gemm_kernel(const Fp8GemmLaunch& launch, int num_threads) {
    DSO_TRY(allow_shared_memory<kernel>(launch.device, sizeof(Shared)));
    const LaunchShape shape{dim3(launch.num_ctas), dim3(num_threads),   sizeof(Shared),
                            launch.stream,         launch.cluster_size, launch.overlaps_predecessor};
    return launch_kernel(kernel, shape, launch.maps, launch.arguments, launch.output);
}

template <int kNumMGroups, int BLOCK_N, int kNumKGroups, int kNumStages, int kMostSplits>
dso_status launch_fp8_gemm(const Fp8GemmLaunch& launch) {
    using Shape = Fp8GemmShape<kNumMGroups, BLOCK_N, kNumKGroups, kNumStages, kMostSplits>;
    using Shared = Fp8GemmShared<Shape>;
    constexpr Fp8GemmConfig config = Fp8GemmConfig::tall(kNumMGroups, BLOCK_N, kNumKGroups, kNumStages, kMostSplits);
    static_assert(sizeof(Shared) <= config.shared_bytes(), "the planner's view of a tile is the kernel's");
    if constexpr (config.is_largest()) {
        using DenseShared = Fp8GemmDenseShared<Shape>;
        if (launch.is_dense_by_tma)
            return launch_fp8_gemm_kernel<sm90_fp8_gemm_dense_kernel<Shape>, DenseShared>(launch, Shape::kNumThreads);
    }
    return launch_fp8_gemm_kernel<sm90_fp8_gemm_kernel<Shape>, Shared>(launch, Shape::kNumThreads);
}

template <int kMaxRows, int BLOCK_N, int kNumKGroups, int kNumStages, int kCtasPerSm>
dso_status launch_fp8_swap_ab(const Fp8GemmLaunch& launch) {
    using Shape = Fp8SwapAbShape<kMaxRows, BLOCK_N, kNumKGroups, kNumStages, kCtasPerSm>;
    using Shared = Fp8SwapAbShared<Shape>;
    constexpr Fp8GemmConfig config = Fp8GemmConfig::swapped(kMaxRows, BLOCK_N, kNumKGroups, kNumStages, kCtasPerSm);
    static_assert(sizeof(Shared) <= config.shared_bytes(), "the planner's view of a tile is the kernel's");
    static_assert((sizeof(Shared) + 1024) * kCtasPerSm <= 233472, "an SM has room for so many CTAs");
    return launch_fp8_gemm_kernel<sm90_fp8_gemm_swap_ab_kernel<Shape>, Shared>(launch, Shape::kNumThreads);
}

}  // namespace dso

#define DSO_FP8_GEMM(...) template dso_status dso::launch_fp8_gemm<__VA_ARGS__>(const dso::Fp8GemmLaunch&);
#define DSO_FP8_SWAP_AB(...) template dso_status dso::launch_fp8_swap_ab<__VA_ARGS__>(const dso::Fp8GemmLaunch&);
