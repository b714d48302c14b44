// Which tile computes a shape: pure arithmetic on the host, pinned by tests.
#pragma once

#include <cstdint>

namespace dso {

struct Fp8GemmConfig {
    int num_math_warpgroups, block_n, num_stages;

    constexpr int block_m() const { return 64 * num_math_warpgroups; }
    constexpr int num_threads() const { return 128 * (num_math_warpgroups + 1); }
    /// What the kernel's shared memory comes to with a bfloat16 epilogue (static_assert in fp8_gemm_instance.cuh).
    constexpr int shared_bytes() const {
        const int stage = (block_m() + block_n) * 128 + (block_m() + 31) / 32 * 128 + 4 + 2 * 8;
        const int used = num_stages * stage + block_m() * block_n * 2;
        return (used + 1023) / 1024 * 1024;
    }
};

inline constexpr Fp8GemmConfig kFp8GemmConfigs[] = {
#define DSO_FP8_GEMM(num_math_warpgroups, block_n, num_stages) {num_math_warpgroups, block_n, num_stages},
#include "launch/fp8_gemm_configs.def"
#undef DSO_FP8_GEMM
};

/// The index in kFp8GemmConfigs of the tile with the least estimated time for an [m, n, k] GEMM on `num_sms` SMs.
int select_fp8_gemm_config(int64_t m, int64_t n, int64_t k, int num_sms);

}  // namespace dso
