#pragma once

#include "launch/deepseek_kernels.h"

namespace dso {

/// Whether the GEMM is within contract; DSO_INVALID names the argument that is not.
dso_status check_fp8_gemm(const dso_fp8_gemm& gemm);
dso_status check_m_grouped_fp8_gemm(const dso_m_grouped_fp8_gemm& group);
dso_status check_k_grouped_fp8_gemm(const dso_k_grouped_fp8_gemm& group);

}  // namespace dso
