#include "device/math.cuh"
#include "torch/ops.h"

namespace dso {
namespace {

constexpr int64_t kBlock = 128;

dso_dtype high_precision_dtype(const Tensor& x) {
    const ScalarType dtype = x.scalar_type();
    require(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float,
            "per_token_cast_to_fp8: x");
    return dtype == ScalarType::BFloat16 ? DSO_BF16 : dtype == ScalarType::Half ? DSO_F16 : DSO_F32;
}

}  // namespace

std::tuple<Tensor, Tensor> per_token_cast_to_fp8(const Tensor& x, bool use_ue8m0, bool mn_major, double amax_floor) {
    const dso_dtype dtype = high_precision_dtype(x);
    const int64_t dim = x.dim();
    require(dim >= 2 && has_contiguous_rows(x), "per_token_cast_to_fp8: x must have contiguous rows");
    const int64_t m = x.size(dim - 2), k = x.size(dim - 1), num_k_blocks = ceil_div(k, kBlock);

    // Leading dimensions are one dimension of groups, if their strides allow it.
    require(dim <= 3, "per_token_cast_to_fp8: x must have two or three dimensions on CUDA");
    const int64_t num_groups = dim == 3 ? x.size(0) : 1, stride_group = dim == 3 ? x.stride(0) : 0;
    const int64_t aligned_m = align_up<int64_t>(m, 4);
    const int64_t sf_stride_m = mn_major ? 1 : num_k_blocks, sf_stride_k = mn_major ? aligned_m : 1;
    const int64_t sf_stride_group = (mn_major ? aligned_m : m) * num_k_blocks;

    Tensor q = dim == 3 ? empty_strided({num_groups, m, k}, {m * k, k, 1}, ScalarType::Float8_e4m3fn, x)
                        : empty_strided({m, k}, {k, 1}, ScalarType::Float8_e4m3fn, x);
    Tensor sf = dim == 3 ? empty_strided({num_groups, m, num_k_blocks}, {sf_stride_group, sf_stride_m, sf_stride_k},
                                         ScalarType::Float, x)
                         : empty_strided({m, num_k_blocks}, {sf_stride_m, sf_stride_k}, ScalarType::Float, x);

    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const dso_per_token_cast cast{x.const_data_ptr(),
                                  q.mutable_data_ptr(),
                                  static_cast<float*>(sf.mutable_data_ptr()),
                                  num_groups,
                                  m,
                                  k,
                                  stride_group,
                                  x.stride(dim - 2),
                                  sf_stride_group,
                                  sf_stride_m,
                                  sf_stride_k,
                                  dtype,
                                  static_cast<float>(amax_floor),
                                  use_ue8m0};
    require_ok(dso_per_token_cast_to_fp8(&cast, current_stream(device)));
    return {q, sf};
}

}  // namespace dso
