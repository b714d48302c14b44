#include "device/math.cuh"
#include "torch/ops.h"

namespace dso {
namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kFewRows = 128;  // up to which there is no workspace to be asked for

void run_fp8_gemm(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb, Tensor& out, bool accumulate,
                  bool batch_invariant, bool b_is_constant) {
    const int64_t m = a.size(0), n = b.size(0), k = a.size(1);
    const int32_t device = a.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    dso_fp8_gemm gemm{a.const_data_ptr(),
                      static_cast<const float*>(sfa.const_data_ptr()),
                      b.const_data_ptr(),
                      static_cast<const float*>(sfb.const_data_ptr()),
                      out.mutable_data_ptr(),
                      m,
                      n,
                      k,
                      a.stride(0),
                      b.stride(0),
                      out.stride(0),
                      sfa.stride(0),
                      sfa.stride(1),
                      sfb.stride(0),
                      sfb.stride(1),
                      out.scalar_type() == ScalarType::BFloat16 ? DSO_BF16 : DSO_F32,
                      accumulate,
                      batch_invariant,
                      b_is_constant,
                      nullptr};
    Tensor workspace;
    if (m > kFewRows) {
        int64_t num_bytes;
        require_ok(dso_fp8_gemm_workspace(&gemm, &num_bytes));
        if (num_bytes > 0) {
            workspace = empty_strided({num_bytes}, {1}, ScalarType::Byte, a);
            gemm.workspace = workspace.mutable_data_ptr();
        }
    }
    require_ok(dso_fp8_gemm_nt(&gemm, current_stream(device)));
}

void check_operands(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb) {
    require(is_tensor_of(a, ScalarType::Float8_e4m3fn, a, {-1, -1}), "fp8_gemm_nt: a");
    const int64_t k = a.size(1);
    require(is_tensor_of(b, ScalarType::Float8_e4m3fn, a, {-1, k}), "fp8_gemm_nt: b");
    require(is_tensor_of(sfa, ScalarType::Float, a, {a.size(0), ceil_div(k, kBlock)}), "fp8_gemm_nt: sfa");
    require(is_tensor_of(sfb, ScalarType::Float, a, {ceil_div(b.size(0), kBlock), ceil_div(k, kBlock)}),
            "fp8_gemm_nt: sfb");
    require(has_contiguous_rows(a) && has_contiguous_rows(b), "fp8_gemm_nt: rows of a and b must be contiguous");
}

}  // namespace

Tensor fp8_gemm_nt(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb, ScalarType out_dtype,
                   bool batch_invariant, bool b_is_constant) {
    check_operands(a, sfa, b, sfb);
    require(out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Float, "fp8_gemm_nt: out_dtype");
    Tensor out = empty_strided({a.size(0), b.size(0)}, {b.size(0), 1}, out_dtype, a);
    run_fp8_gemm(a, sfa, b, sfb, out, false, batch_invariant, b_is_constant);
    return out;
}

void fp8_gemm_nt_out(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb, Tensor out,
                     bool accumulate, bool batch_invariant, bool b_is_constant) {
    check_operands(a, sfa, b, sfb);
    const ScalarType dtype = out.scalar_type();
    require(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, "fp8_gemm_nt_out: out");
    require(is_tensor_of(out, dtype, a, {a.size(0), b.size(0)}), "fp8_gemm_nt_out: out");
    require(has_contiguous_rows(out), "fp8_gemm_nt_out: rows of out must be contiguous");
    require(are_apart(out, a) && are_apart(out, sfa) && are_apart(out, b) && are_apart(out, sfb),
            "fp8_gemm_nt_out: out overlaps an input");
    run_fp8_gemm(a, sfa, b, sfb, out, accumulate, batch_invariant, b_is_constant);
}

}  // namespace dso
