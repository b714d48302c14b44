#include <cmath>

#include "torch/ops.h"
#include "torch/rows.h"

namespace dso {
namespace {

constexpr float kAmaxFloor = 1e-4f;  // AMAX_FLOOR of deepseek_ops/quantize.py

void check_operands(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, int64_t min_dim) {
    high_precision_dtype(x, "rms_norm: x");
    require(x.dim() >= min_dim, "rms_norm: x has too few dimensions");
    require(x.numel() == 0 || has_contiguous_rows(x), "rms_norm: x must have contiguous rows");
    const int64_t d = x.size(x.dim() - 1);
    const bool same = is_tensor_of(weight, x.scalar_type(), x, {d});
    require(same || is_tensor_of(weight, ScalarType::Float, x, {d}), "rms_norm: weight");
    require(has_contiguous_rows(weight), "rms_norm: weight must be contiguous");
    require(eps > 0 && std::isfinite(eps), "rms_norm: eps");
    if (!residual) return;
    require(residual->scalar_type() == x.scalar_type() && residual->dim() == x.dim() &&
                residual->is_cpu() == x.is_cpu() && residual->get_device_index() == x.get_device_index(),
            "rms_norm: residual");
    for (int64_t dim = 0; dim < x.dim(); ++dim) require(residual->size(dim) == x.size(dim), "rms_norm: residual");
    require(x.numel() == 0 || has_contiguous_rows(*residual), "rms_norm: residual must have contiguous rows");
}

/// Where a norm's results go; null for what it does not have.
struct Outputs {
    Tensor *y, *residual_out, *q, *sf;
};

void run_norm(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, bool use_ue8m0,
              const Outputs& outputs) {
    const Tensor source = with_one_group_stride(x), added = residual ? with_one_group_stride(*residual) : x;
    const Rows rows = single_rows_of(source), added_rows = residual ? single_rows_of(added) : Rows{};
    const Rows sf_rows = outputs.sf ? single_rows_of(*outputs.sf) : Rows{};
    const auto pointer = [](Tensor* tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; };
    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const dso_norm norm{source.const_data_ptr(),
                        residual ? added.const_data_ptr() : nullptr,
                        weight.const_data_ptr(),
                        pointer(outputs.residual_out),
                        pointer(outputs.y),
                        pointer(outputs.q),
                        static_cast<float*>(pointer(outputs.sf)),
                        rows.num_groups,
                        rows.m,
                        rows.k,
                        rows.stride_group,
                        rows.stride_m,
                        added_rows.stride_group,
                        added_rows.stride_m,
                        sf_rows.stride_group,
                        sf_rows.stride_m,
                        outputs.sf ? outputs.sf->stride(outputs.sf->dim() - 1) : 0,
                        high_precision_dtype(x, "rms_norm: x"),
                        high_precision_dtype(weight, "rms_norm: weight"),
                        static_cast<float>(eps),
                        kAmaxFloor,
                        use_ue8m0};
    require_ok(dso_rms_norm(&norm, current_stream(device)));
}

Tensor empty_like(const Tensor& x) { return empty_rows(x, x.size(x.dim() - 1), x.scalar_type()); }

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
    check_operands(x, nullptr, weight, eps, 1);
    Tensor y = empty_like(x);
    run_norm(x, nullptr, weight, eps, false, {&y, nullptr, nullptr, nullptr});
    return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
    check_operands(x, &residual, weight, eps, 1);
    Tensor y = empty_like(x), residual_out = empty_like(x);
    run_norm(x, &residual, weight, eps, false, {&y, &residual_out, nullptr, nullptr});
    return {y, residual_out};
}

std::tuple<Tensor, Tensor> rms_norm_cast_to_fp8(const Tensor& x, const Tensor& weight, double eps, bool use_ue8m0,
                                                bool mn_major) {
    check_operands(x, nullptr, weight, eps, 2);
    const int64_t d = x.size(x.dim() - 1);
    Tensor q = empty_rows(x, d, ScalarType::Float8_e4m3fn), sf = empty_scales(x, d, mn_major);
    run_norm(x, nullptr, weight, eps, use_ue8m0, {nullptr, nullptr, &q, &sf});
    return {q, sf};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_cast_to_fp8(const Tensor& x, const Tensor& residual,
                                                            const Tensor& weight, double eps, bool use_ue8m0,
                                                            bool mn_major) {
    check_operands(x, &residual, weight, eps, 2);
    const int64_t d = x.size(x.dim() - 1);
    Tensor q = empty_rows(x, d, ScalarType::Float8_e4m3fn), sf = empty_scales(x, d, mn_major);
    Tensor residual_out = empty_like(x);
    run_norm(x, &residual, weight, eps, use_ue8m0, {nullptr, &residual_out, &q, &sf});
    return {q, sf, residual_out};
}

}  // namespace dso
