#pragma once

#include <algorithm>

#include "launch/deepseek_kernels.h"

namespace dso {

/// The experts that the kernel has room for.
inline constexpr int64_t kMaxMappedExperts = 4096;

/// The most rows that `num_pairs` pairs can need.
inline int64_t num_mapped_rows(int64_t num_pairs, int64_t num_experts, int64_t alignment) {
    const int64_t at_work = std::min(num_experts, num_pairs);
    return alignment * (at_work + (num_pairs - at_work) / alignment);
}

/// Whether the call is within contract; DSO_INVALID names the argument that is not.
dso_status check_moe_mapping(const dso_expert_rows& rows);

}  // namespace dso
