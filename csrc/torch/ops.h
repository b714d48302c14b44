// The ops that have a CUDA kernel. Schemas, fakes and references are in deepseek_ops/*.py.
#pragma once

#include <tuple>

#include "torch/tensor.h"

namespace dso {

Tensor fp8_gemm_nt(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb, ScalarType out_dtype);

void fp8_gemm_nt_out(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb, Tensor out,
                     bool accumulate);

std::tuple<Tensor, Tensor> per_token_cast_to_fp8(const Tensor& x, bool use_ue8m0, bool mn_major, double amax_floor);

std::tuple<Tensor, Tensor> per_block_cast_to_fp8(const Tensor& x, bool use_ue8m0, double amax_floor);

Tensor silu_mul(const Tensor& x);

std::tuple<Tensor, Tensor> silu_mul_cast_to_fp8(const Tensor& x, bool use_ue8m0, bool mn_major);

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps);

std::tuple<Tensor, Tensor> rms_norm_cast_to_fp8(const Tensor& x, const Tensor& weight, double eps, bool use_ue8m0,
                                                bool mn_major);

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_cast_to_fp8(const Tensor& x, const Tensor& residual,
                                                            const Tensor& weight, double eps, bool use_ue8m0,
                                                            bool mn_major);

}  // namespace dso
