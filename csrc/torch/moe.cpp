#include "launch/moe_mapping_checks.h"
#include "torch/ops.h"
#include "torch/rows.h"

namespace dso {
namespace {

/// An uninitialised contiguous matrix of x's type, which may be one that this library has no name for.
Tensor empty_matrix(int64_t m, int64_t n, const Tensor& x) {
    const int64_t sizes[] = {m, n}, strides[] = {n > 0 ? n : 1, 1};
    int32_t dtype, device_type;
    AtenTensorHandle handle;
    require(aoti_torch_get_dtype(x.get(), &dtype) == 0 && aoti_torch_get_device_type(x.get(), &device_type) == 0 &&
                aoti_torch_empty_strided(2, sizes, strides, dtype, device_type, x.get_device_index(), &handle) == 0,
            "could not allocate an output");
    return Tensor(handle);
}

}  // namespace

std::tuple<Tensor, Tensor> moe_gate(const Tensor& logits, std::optional<Tensor> bias, int64_t num_topk,
                                    int64_t num_groups, int64_t num_topk_groups, std::string scoring_func,
                                    bool norm_topk_prob, double routed_scaling_factor) {
    const char* op = "moe_gate";
    require(logits.dim() == 2 && logits.scalar_type() == ScalarType::Float, op);
    const int64_t t = logits.size(0), num_experts = logits.size(1);
    require(logits.numel() == 0 || has_contiguous_rows(logits), op);
    require(!bias || (is_tensor_of(*bias, ScalarType::Float, logits, {num_experts}) && bias->is_contiguous()), op);
    require(scoring_func == "sigmoid" || scoring_func == "softmax", op);
    require(num_topk >= 1 && num_topk <= num_experts, op);
    Tensor weights = empty_strided({t, num_topk}, {num_topk, 1}, ScalarType::Float, logits);
    Tensor idx = empty_strided({t, num_topk}, {num_topk, 1}, ScalarType::Int, logits);
    const int32_t device = logits.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const dso_gate gate{static_cast<const float*>(logits.const_data_ptr()),
                        bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
                        static_cast<float*>(weights.mutable_data_ptr()),
                        static_cast<int32_t*>(idx.mutable_data_ptr()),
                        t,
                        num_experts,
                        num_groups,
                        num_topk,
                        num_topk_groups,
                        stride_of(logits, 0),
                        scoring_func == "softmax",
                        norm_topk_prob,
                        static_cast<float>(routed_scaling_factor)};
    require_ok(dso_moe_gate(&gate, current_stream(device)));
    return {weights, idx};
}

bool has_moe_mapping_kernel(const StableIValue* stack) {
    return torch::stable::detail::to<int64_t>(stack[1]) <= kMaxMappedExperts;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_mapping(const Tensor& topk_idx, int64_t num_experts, int64_t alignment) {
    const char* op = "moe_mapping";
    require(is_tensor_of(topk_idx, ScalarType::Int, topk_idx, {-1, -1}) && topk_idx.is_contiguous(), op);
    require(num_experts >= 1 && alignment >= 1, op);
    const int64_t t = topk_idx.size(0), num_topk = topk_idx.size(1);
    const int64_t num_pairs = t * num_topk;
    require(num_pairs == 0 || alignment < int64_t{1} << 31, op);
    const int64_t num_rows = num_mapped_rows(num_pairs, num_experts, alignment);
    require(num_rows < int64_t{1} << 31, op);  // before anything of that size is allocated
    const auto empty = [&](int64_t length) { return empty_strided({length}, {1}, ScalarType::Int, topk_idx); };
    Tensor token_idx = empty(num_rows), offsets = empty(num_experts + 1), m_indices = empty(num_rows);
    Tensor row_idx = empty_matrix(t, num_topk, topk_idx);
    const int32_t device = topk_idx.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const dso_expert_rows rows{static_cast<const int32_t*>(topk_idx.const_data_ptr()),
                               static_cast<int32_t*>(token_idx.mutable_data_ptr()),
                               static_cast<int32_t*>(row_idx.mutable_data_ptr()),
                               static_cast<int32_t*>(offsets.mutable_data_ptr()),
                               static_cast<int32_t*>(m_indices.mutable_data_ptr()),
                               t,
                               num_topk,
                               num_experts,
                               alignment,
                               num_rows};
    require_ok(dso_moe_mapping(&rows, current_stream(device)));
    return {token_idx, row_idx, offsets, m_indices};
}

Tensor moe_permute(const Tensor& x, const Tensor& token_idx) {
    const char* op = "moe_permute";
    require(x.dim() == 2 && is_tensor_of(token_idx, ScalarType::Int, x, {-1}), op);
    const int64_t num_rows = token_idx.size(0), d = x.size(1);
    require(num_rows <= 1 || token_idx.stride(0) == 1, op);
    Tensor out = empty_matrix(num_rows, d, x);
    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const dso_row_gather gather{x.const_data_ptr(),
                                static_cast<const int32_t*>(token_idx.const_data_ptr()),
                                out.mutable_data_ptr(),
                                x.size(0),
                                d,
                                num_rows,
                                stride_of(x, 0),
                                stride_of(x, 1),
                                static_cast<int64_t>(x.element_size())};
    require_ok(dso_moe_permute(&gather, current_stream(device)));
    return out;
}

Tensor moe_unpermute(const Tensor& y, const Tensor& row_idx, const Tensor& topk_weights) {
    const char* op = "moe_unpermute";
    const dso_dtype dtype = high_precision_dtype(y, op);
    require(y.dim() == 2 && (y.numel() == 0 || has_contiguous_rows(y)), op);
    require(is_tensor_of(row_idx, ScalarType::Int, y, {-1, -1}) && row_idx.is_contiguous(), op);
    const int64_t t = row_idx.size(0), num_topk = row_idx.size(1), d = y.size(1);
    require(is_tensor_of(topk_weights, ScalarType::Float, y, {t, num_topk}) && topk_weights.is_contiguous(), op);
    Tensor out = empty_matrix(t, d, y);
    const int32_t device = y.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const dso_row_sum sum{y.const_data_ptr(),
                          static_cast<const int32_t*>(row_idx.const_data_ptr()),
                          static_cast<const float*>(topk_weights.const_data_ptr()),
                          out.mutable_data_ptr(),
                          y.size(0),
                          t,
                          d,
                          num_topk,
                          stride_of(y, 0),
                          dtype};
    require_ok(dso_moe_unpermute(&sum, current_stream(device)));
    return out;
}

}  // namespace dso
