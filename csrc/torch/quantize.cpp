#include "device/math.cuh"
#include "torch/ops.h"
#include "torch/rows.h"

namespace dso {
namespace {

constexpr int64_t kBlock = 128;

/// Uninitialised scales of the blocks of [..., n, k]: [..., ceil(n / 128), ceil(k / 128)].
Tensor empty_block_scales(const Tensor& x) {
    const int64_t dim = x.dim();
    int64_t sizes[64], strides[64];
    require(dim <= 64, "per_block_cast_to_fp8: x has too many dimensions");
    for (int64_t i = 0; i < dim; ++i) sizes[i] = i < dim - 2 ? x.size(i) : ceil_div(x.size(i), kBlock);
    int64_t step = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
        strides[i] = step;
        step *= sizes[i] > 1 ? sizes[i] : 1;
    }
    return empty_strided(dim, sizes, strides, ScalarType::Float, x);
}

}  // namespace

std::tuple<Tensor, Tensor> per_token_cast_to_fp8(const Tensor& x, bool use_ue8m0, bool mn_major, double amax_floor) {
    const dso_dtype dtype = high_precision_dtype(x, "per_token_cast_to_fp8: x");
    require(x.dim() >= 2 && x.dim() <= 3, "per_token_cast_to_fp8: x must have two or three dimensions");
    require(x.numel() == 0 || has_contiguous_rows(x), "per_token_cast_to_fp8: x must have contiguous rows");
    const Rows rows = single_rows_of(x);

    Tensor q = empty_rows(x, rows.k, ScalarType::Float8_e4m3fn);
    Tensor sf = empty_scales(x, rows.k, mn_major);
    const Rows sf_rows = single_rows_of(sf);
    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const dso_per_token_cast cast{x.const_data_ptr(),
                                  q.mutable_data_ptr(),
                                  static_cast<float*>(sf.mutable_data_ptr()),
                                  rows.num_groups,
                                  rows.m,
                                  rows.k,
                                  rows.stride_group,
                                  rows.stride_m,
                                  sf_rows.stride_group,
                                  sf_rows.stride_m,
                                  sf.stride(sf.dim() - 1),
                                  dtype,
                                  static_cast<float>(amax_floor),
                                  use_ue8m0};
    require_ok(dso_per_token_cast_to_fp8(&cast, current_stream(device)));
    return {q, sf};
}

std::tuple<Tensor, Tensor> per_block_cast_to_fp8(const Tensor& x, bool use_ue8m0, double amax_floor) {
    const dso_dtype dtype = high_precision_dtype(x, "per_block_cast_to_fp8: x");
    require(x.dim() >= 2, "per_block_cast_to_fp8: x has too few dimensions");
    require(x.numel() == 0 || has_contiguous_rows(x), "per_block_cast_to_fp8: x must have contiguous rows");
    const Tensor source = with_one_group_stride(x);
    const Rows rows = rows_of(source);

    Tensor q = empty_rows(x, rows.k, ScalarType::Float8_e4m3fn);
    Tensor sf = empty_block_scales(x);
    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const dso_per_block_cast cast{source.const_data_ptr(),
                                  q.mutable_data_ptr(),
                                  static_cast<float*>(sf.mutable_data_ptr()),
                                  rows.num_groups,
                                  rows.m,
                                  rows.k,
                                  rows.stride_group,
                                  rows.stride_m,
                                  dtype,
                                  static_cast<float>(amax_floor),
                                  use_ue8m0};
    require_ok(dso_per_block_cast_to_fp8(&cast, current_stream(device)));
    return {q, sf};
}

}  // namespace dso
