#pragma once

#include "launch/deepseek_kernels.h"

namespace dso {

/// Whether the GEMM is within contract; DSO_INVALID names the argument that is not.
dso_status check_m_grouped_bf16_gemm(const dso_m_grouped_bf16_gemm& gemm);

}  // namespace dso
