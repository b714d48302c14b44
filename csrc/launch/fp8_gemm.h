// What launch/fp8_gemm.cu, which chooses, and the compiled instances share.
#pragma once

#include "device/direct_output.h"
#include "kernels/fp8_gemm_arguments.h"
#include "launch/deepseek_kernels.h"

namespace dso {

/// A checked GEMM, ready to launch.
struct Fp8GemmLaunch {
    Fp8GemmMaps maps;
    Fp8GemmArguments arguments;
    DirectOutput output;  // only where it stores from registers
    bool loads_scales_by_tma, stores_by_tma;
    int device, num_sms;
    dso_stream stream;
};

/// Launches one line of fp8_gemm_configs.def; instantiated once for each (fp8_gemm_instance.cuh).
template <int kNumMathWarpgroups, int BLOCK_N, int kNumStages>
dso_status launch_fp8_gemm(const Fp8GemmLaunch& launch);

}  // namespace dso
