#include "torch/ops.h"

namespace dso {
namespace {

void check_operands(const Tensor& a, const Tensor& b, const Tensor& offsets, const char* op) {
    require(b.dim() == 3, op);
    const int64_t g = b.size(0), n = b.size(1), k = b.size(2);
    require(is_tensor_of(a, ScalarType::BFloat16, a, {-1, k}), op);
    require(is_tensor_of(b, ScalarType::BFloat16, a, {g, n, k}), op);
    require(is_tensor_of(offsets, ScalarType::Int, a, {g + 1}), op);
    require(g == 0 || offsets.stride(0) == 1, op);
    require(has_contiguous_rows(a) && has_contiguous_rows(b), op);
}

void run(const Tensor& a, const Tensor& b, const Tensor& offsets, Tensor& out, bool clear_unowned) {
    const int32_t device = a.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const dso_m_grouped_bf16_gemm gemm{a.const_data_ptr(),
                                       b.const_data_ptr(),
                                       out.mutable_data_ptr(),
                                       static_cast<const int32_t*>(offsets.const_data_ptr()),
                                       b.size(0),
                                       a.size(0),
                                       b.size(1),
                                       b.size(2),
                                       a.stride(0),
                                       b.stride(1),
                                       out.stride(0),
                                       b.stride(0),
                                       clear_unowned};
    require_ok(dso_m_grouped_bf16_gemm_nt(&gemm, current_stream(device)));
}

}  // namespace

Tensor m_grouped_bf16_gemm_nt_offsets(const Tensor& a, const Tensor& b, const Tensor& offsets) {
    check_operands(a, b, offsets, "m_grouped_bf16_gemm_nt_offsets");
    const int64_t m = a.size(0), n = b.size(1);
    Tensor out = empty_strided({m, n}, {n, 1}, ScalarType::BFloat16, a);
    run(a, b, offsets, out, true);
    return out;
}

void m_grouped_bf16_gemm_nt_offsets_out(const Tensor& a, const Tensor& b, const Tensor& offsets, Tensor out) {
    constexpr const char* op = "m_grouped_bf16_gemm_nt_offsets_out";
    check_operands(a, b, offsets, op);
    require(is_tensor_of(out, ScalarType::BFloat16, a, {a.size(0), b.size(1)}), op);
    require(has_contiguous_rows(out), op);
    require(are_apart(out, a) && are_apart(out, b) && are_apart(out, offsets), op);
    run(a, b, offsets, out, false);
}

}  // namespace dso
