#pragma once

#include "launch/deepseek_kernels.h"

namespace dso {

/// Whether the call is within contract; DSO_INVALID names the argument that is not.
dso_status check_mla_cache_gather(const dso_latent_gather& gather);

}  // namespace dso
