// What launch/fp8_gemm.cu, which plans, and the compiled instances share.
#pragma once

#include "kernels/fp8_gemm_arguments.h"
#include "launch/deepseek_kernels.h"

namespace dso {

/// A checked and planned GEMM, ready to launch.
struct Fp8GemmLaunch {
    Fp8GemmMaps maps;
    Fp8GemmArguments arguments;
    DirectOutput output;
    int device, num_ctas, cluster_size;
    bool is_dense_by_tma;       // sm90_fp8_gemm_dense.cuh can do it
    bool overlaps_predecessor;  // starts while the kernel before it ends
    dso_stream stream;
};

/// One line of fp8_gemm_configs.def each (fp8_gemm_instance.cuh).
template <int kNumMGroups, int BLOCK_N, int kNumKGroups, int kNumStages, int kMostSplits = 1>
dso_status launch_fp8_gemm(const Fp8GemmLaunch& launch);
template <int kMaxRows, int BLOCK_N, int kNumKGroups, int kNumStages, int kCtasPerSm>
dso_status launch_fp8_swap_ab(const Fp8GemmLaunch& launch);

}  // namespace dso
