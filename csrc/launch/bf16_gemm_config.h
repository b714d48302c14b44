// Which tile computes a grouped bfloat16 GEMM: pure arithmetic on the host.
#pragma once

#include <cstdint>

namespace dso {

/// A compiled tile.
struct Bf16GemmConfig {
    int max_rows, block_n, num_stages;

    /// What the kernel's shared memory comes to at most (static_assert in bf16_gemm.cu).
    constexpr int shared_bytes() const {
        const int barriers = 2 * 8, queue = 128;
        return (num_stages * ((max_rows + block_n) * 128 + barriers) + queue + 1023) / 1024 * 1024;
    }
};

inline constexpr Bf16GemmConfig kBf16GemmConfigs[] = {
#define DSO_BF16_SWAP_AB(...) {__VA_ARGS__},
#include "launch/bf16_gemm_configs.def"
#undef DSO_BF16_SWAP_AB
};

/// Its place in kBf16GemmConfigs, for groups of about `rows_per_group` rows; how many there are of which is known on
/// the device only.
int choose_bf16_gemm_config(int64_t rows_per_group);

}  // namespace dso
