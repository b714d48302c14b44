#pragma once

#include "launch/deepseek_kernels.h"

namespace dso {

/// Whether the quantization is within contract; DSO_INVALID names the argument that is not.
dso_status check_per_token_cast(const dso_per_token_cast& cast);
dso_status check_per_block_cast(const dso_per_block_cast& cast);

/// The smallest amax_floor that keeps 448 / amax within float32.
inline constexpr float kSmallestAmaxFloor = 1e-30f;

}  // namespace dso
