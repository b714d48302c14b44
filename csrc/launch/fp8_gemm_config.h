// What computes a shape: pure arithmetic on the host, pinned by tests.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dso {

/// A compiled tile.
struct Fp8GemmConfig {
    bool swaps_operands;
    int num_m_groups;  // warpgroups beside each other, 64 rows of a each, unless operands are swapped
    int num_k_groups;  // that take a step of k in turn
    int max_rows, block_n, num_stages, ctas_per_sm;
    int most_splits;  // CTAs of a cluster that can share k

    static constexpr Fp8GemmConfig tall(int num_m_groups, int block_n, int num_k_groups, int num_stages,
                                        int most_splits = 1) {
        return {false, num_m_groups, num_k_groups, 64 * num_m_groups, block_n, num_stages, 1, most_splits};
    }
    static constexpr Fp8GemmConfig swapped(int max_rows, int block_n, int num_k_groups, int num_stages,
                                           int ctas_per_sm) {
        return {true, 1, num_k_groups, max_rows, block_n, num_stages, ctas_per_sm, 8};
    }

    /// The tile of GEMMs of many rows, for which there is a kernel of its own where these are dense.
    constexpr bool is_largest() const { return !swaps_operands && max_rows == 192 && block_n == 128; }

    /// Floats of sfa that a step loads: those of unpadded groups may start up to three later than TMA can.
    constexpr int scale_run() const { return swaps_operands ? max_rows : max_rows + 4; }

    /// What the kernel's shared memory comes to at most (static_assert in fp8_gemm_instance.cuh).
    constexpr int shared_bytes() const {
        const int scales = (scale_run() + 31) / 32 * 128 + 4, barriers = (swaps_operands ? 3 : 2) * 8;
        const int stage = (max_rows + block_n) * 128 + scales + (is_largest() ? 4 : 0) + barriers;
        const int output = swaps_operands ? num_k_groups * max_rows * (block_n + 4) * 4
                                          : max_rows * (std::max(block_n, 64) * 2 + (num_k_groups - 1) * block_n * 4);
        const int used = num_stages * stage + output + 256;  // with the queue of tiles
        return (used + 1023) / 1024 * 1024;
    }
};

inline constexpr Fp8GemmConfig kFp8GemmConfigs[] = {
#define DSO_FP8_GEMM(...) Fp8GemmConfig::tall(__VA_ARGS__),
#define DSO_FP8_SWAP_AB(...) Fp8GemmConfig::swapped(__VA_ARGS__),
#include "launch/fp8_gemm_configs.def"
#undef DSO_FP8_GEMM
#undef DSO_FP8_SWAP_AB
};

struct Fp8GemmPlan {
    int config;                // in kFp8GemmConfigs
    int num_splits;            // CTAs of a cluster that share k
    int num_shared_tiles = 0;  // all that make no full wave, which CTAs compute step by step (device/stream_k.cuh)

    constexpr const Fp8GemmConfig& tile() const { return kFp8GemmConfigs[config]; }

    /// Whether the tiles of a low last block of rows are wide (sm90_fp8_gemm_dense.cuh).
    bool has_wide_tiles(int64_t m, int64_t n, int num_sms) const;
    int64_t num_tiles(int64_t m, int64_t n, int num_sms) const;
};

/// The room for what the CTAs leave to each other where they share tiles: sums, and whether these are there.
struct SharingSpace {
    int64_t sum_bytes, left_bytes;

    explicit SharingSpace(int num_ctas) {
        constexpr int kWarps = 12, kSums = 64;  // of a CTA, of a thread, of the largest tile
        sum_bytes = int64_t{num_ctas} * kWarps * 32 * kSums * int64_t{sizeof(float)};
        left_bytes = int64_t{num_ctas} * kWarps * int64_t{sizeof(uint64_t)};
    }

    int64_t num_bytes() const { return sum_bytes + left_bytes; }
};

/// Whether the plan can be carried out for an [m, n, k] GEMM on `num_sms` SMs.
bool is_possible(const Fp8GemmPlan& plan, int64_t m, int64_t n, int64_t k, int num_sms);

/// The plan with the least estimated time for an [m, n, k] GEMM on `num_sms` SMs. Batch-invariant: one of those whose
/// sums are added up in ascending order of k, whatever m is; these share no tiles.
Fp8GemmPlan plan_fp8_gemm(int64_t m, int64_t n, int64_t k, bool batch_invariant, int num_sms);

/// The same for groups of about `rows_per_group` rows; how many there are of which is known on the device only.
Fp8GemmPlan plan_grouped_fp8_gemm(int64_t rows_per_group);

/// Whether groups can be computed so: a row's bits must not depend on the tiles around it.
bool is_possible_grouped(const Fp8GemmPlan& plan);

}  // namespace dso
