#pragma once

#include "launch/deepseek_kernels.h"

namespace dso {

/// Whether the quantization is within contract; DSO_INVALID names the argument that is not.
dso_status check_per_token_cast(const dso_per_token_cast& cast);

}  // namespace dso
