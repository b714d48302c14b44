#include "torch/ops.h"

namespace dso {
namespace {

constexpr int64_t kKeyDim = 192, kValueDim = 128;

/// Whether an argument, a tensor, has three dimensions, the last of `width`, and can be described to TMA: its rows do
/// not overlap, as those of a broadcast do.
bool is_of_heads(StableIValue x, int64_t width) {
    const auto tensor = torch::stable::detail::to<AtenTensorHandle>(x);
    int64_t dim, size[3], stride[3];
    if (aoti_torch_get_dim(tensor, &dim) != 0 || dim != 3) return false;
    for (int64_t i = 0; i < 3; ++i) {
        if (aoti_torch_get_size(tensor, i, &size[i]) != 0 || aoti_torch_get_stride(tensor, i, &stride[i]) != 0)
            return false;
        if (i < 2 && size[i] > 1 && stride[i] < width) return false;
    }
    return size[2] == width;
}

}  // namespace

bool has_mla_prefill_kernel(const StableIValue* stack) {
    int32_t dtype;
    if (aoti_torch_get_dtype(torch::stable::detail::to<AtenTensorHandle>(stack[0]), &dtype) != 0) return false;
    return (dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_float16()) &&
           is_of_heads(stack[0], kKeyDim) && is_of_heads(stack[1], kKeyDim) && is_of_heads(stack[2], kValueDim);
}

std::tuple<Tensor, Tensor> mla_prefill(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                       const Tensor& cu_seqlens_k, double softmax_scale, bool causal) {
    const ScalarType dtype = q.scalar_type();
    require(is_tensor_of(q, dtype, q, {-1, -1, kKeyDim}), "mla_prefill: q");
    const int64_t total_q = q.size(0), h = q.size(1);
    require(is_tensor_of(k, dtype, q, {-1, h, kKeyDim}), "mla_prefill: k");
    const int64_t total_k = k.size(0);
    require(is_tensor_of(v, dtype, q, {total_k, h, kValueDim}), "mla_prefill: v");
    require(is_tensor_of(cu_seqlens_q, ScalarType::Int, q, {-1}) && cu_seqlens_q.size(0) >= 1,
            "mla_prefill: cu_seqlens_q");
    require(is_tensor_of(cu_seqlens_k, ScalarType::Int, q, {cu_seqlens_q.size(0)}), "mla_prefill: cu_seqlens_k");
    for (const Tensor* x : {&q, &k, &v, &cu_seqlens_q, &cu_seqlens_k})
        require(has_contiguous_rows(*x), "mla_prefill: rows must be contiguous");

    Tensor out = empty_strided({total_q, h, kValueDim}, {h * kValueDim, kValueDim, 1}, dtype, q);
    Tensor lse = empty_strided({total_q, h}, {h, 1}, ScalarType::Float, q);
    Tensor workspace = empty_strided({DSO_PREFILL_WORKSPACE_BYTES}, {1}, ScalarType::Byte, q);
    const int32_t device = q.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const dso_prefill prefill{q.const_data_ptr(),
                              k.const_data_ptr(),
                              v.const_data_ptr(),
                              static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr()),
                              static_cast<const int32_t*>(cu_seqlens_k.const_data_ptr()),
                              out.mutable_data_ptr(),
                              static_cast<float*>(lse.mutable_data_ptr()),
                              workspace.mutable_data_ptr(),
                              cu_seqlens_q.size(0) - 1,
                              total_q,
                              total_k,
                              h,
                              stride_of(q, 0),
                              stride_of(q, 1),
                              stride_of(k, 0),
                              stride_of(k, 1),
                              stride_of(v, 0),
                              stride_of(v, 1),
                              dtype == ScalarType::BFloat16 ? DSO_BF16 : DSO_F16,
                              softmax_scale,
                              causal};
    require_ok(dso_mla_prefill(&prefill, current_stream(device)));
    return {out, lse};
}

}  // namespace dso
