#include "torch/ops.h"
#include "torch/rows.h"

namespace dso {
namespace {

constexpr float kAmaxFloor = 1e-4f;  // AMAX_FLOOR of deepseek_ops/quantize.py

/// Runs on [..., 2d] into `y`, or where it is null into `q` and `sf`.
void run_silu_mul(const Tensor& x, Tensor* y, Tensor* q, Tensor* sf, bool use_ue8m0) {
    const Tensor source = with_one_group_stride(x);
    const Rows rows = single_rows_of(source), sf_rows = sf ? single_rows_of(*sf) : Rows{};
    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const dso_swiglu call{source.const_data_ptr(),
                          y ? y->mutable_data_ptr() : nullptr,
                          q ? q->mutable_data_ptr() : nullptr,
                          sf ? static_cast<float*>(sf->mutable_data_ptr()) : nullptr,
                          rows.num_groups,
                          rows.m,
                          rows.k / 2,
                          rows.stride_group,
                          rows.stride_m,
                          sf_rows.stride_group,
                          sf_rows.stride_m,
                          sf ? sf->stride(sf->dim() - 1) : 0,
                          high_precision_dtype(x, "silu_mul: x"),
                          kAmaxFloor,
                          use_ue8m0};
    require_ok(dso_silu_mul(&call, current_stream(device)));
}

void check_x(const Tensor& x, int64_t min_dim) {
    high_precision_dtype(x, "silu_mul: x");
    require(x.dim() >= min_dim, "silu_mul: x has too few dimensions");
    require(x.size(x.dim() - 1) % 2 == 0, "silu_mul: x must be even in its last dimension");
    require(x.numel() == 0 || has_contiguous_rows(x), "silu_mul: x must have contiguous rows");
}

}  // namespace

Tensor silu_mul(const Tensor& x) {
    check_x(x, 1);
    Tensor y = empty_rows(x, x.size(x.dim() - 1) / 2, x.scalar_type());
    run_silu_mul(x, &y, nullptr, nullptr, false);
    return y;
}

std::tuple<Tensor, Tensor> silu_mul_cast_to_fp8(const Tensor& x, bool use_ue8m0, bool mn_major) {
    check_x(x, 2);
    const int64_t d = x.size(x.dim() - 1) / 2;
    Tensor q = empty_rows(x, d, ScalarType::Float8_e4m3fn), sf = empty_scales(x, d, mn_major);
    run_silu_mul(x, nullptr, &q, &sf, use_ue8m0);
    return {q, sf};
}

}  // namespace dso
