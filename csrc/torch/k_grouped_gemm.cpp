#include "torch/ops.h"

namespace dso {
namespace {

constexpr int64_t kBlock = 128;

struct Operands {
    const Tensor &a, &sfa, &b, &sfb, &k_offsets;
    const char* op;

    int64_t num_groups() const { return k_offsets.size(0) - 1; }
    int64_t m() const { return a.size(0); }
    int64_t n() const { return b.size(0); }
    int64_t k() const { return a.size(1); }
};

void check_operands(const Operands& x) {
    require(is_tensor_of(x.a, ScalarType::Float8_e4m3fn, x.a, {-1, -1}), x.op);
    require(is_tensor_of(x.b, ScalarType::Float8_e4m3fn, x.a, {-1, x.k()}), x.op);
    require(x.k() % kBlock == 0, x.op);
    require(is_tensor_of(x.sfa, ScalarType::Float, x.a, {x.m(), x.k() / kBlock}), x.op);
    require(is_tensor_of(x.sfb, ScalarType::Float, x.a, {x.n(), x.k() / kBlock}), x.op);
    require(is_tensor_of(x.k_offsets, ScalarType::Int, x.a, {-1}), x.op);
    require(x.num_groups() >= 0 && (x.num_groups() == 0 || x.k_offsets.stride(0) == 1), x.op);
    require(has_contiguous_rows(x.a) && has_contiguous_rows(x.b), x.op);
}

void run(const Operands& x, Tensor& out, bool accumulate) {
    const int32_t device = x.a.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    dso_k_grouped_fp8_gemm group{};
    group.gemm = {x.a.const_data_ptr(),
                  static_cast<const float*>(x.sfa.const_data_ptr()),
                  x.b.const_data_ptr(),
                  static_cast<const float*>(x.sfb.const_data_ptr()),
                  out.mutable_data_ptr(),
                  x.m(),
                  x.n(),
                  x.k(),
                  x.a.stride(0),
                  x.b.stride(0),
                  out.stride(1),
                  x.sfa.stride(0),
                  x.sfa.stride(1),
                  x.sfb.stride(0),
                  x.sfb.stride(1),
                  out.scalar_type() == ScalarType::BFloat16 ? DSO_BF16 : DSO_F32,
                  accumulate,
                  true,
                  false,
                  nullptr};
    group.d_stride_group = out.stride(0);
    group.num_groups = x.num_groups();
    group.k_offsets = static_cast<const int32_t*>(x.k_offsets.const_data_ptr());
    require_ok(dso_k_grouped_fp8_gemm_nt(&group, current_stream(device)));
}

}  // namespace

Tensor k_grouped_fp8_gemm_nt(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                             const Tensor& k_offsets, ScalarType out_dtype) {
    const Operands x{a, sfa, b, sfb, k_offsets, "k_grouped_fp8_gemm_nt"};
    check_operands(x);
    require(out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Float, x.op);
    Tensor out = empty_strided({x.num_groups(), x.m(), x.n()}, {x.m() * x.n(), x.n(), 1}, out_dtype, a);
    run(x, out, false);
    return out;
}

void k_grouped_fp8_gemm_nt_out(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                               const Tensor& k_offsets, Tensor out, bool accumulate) {
    const Operands x{a, sfa, b, sfb, k_offsets, "k_grouped_fp8_gemm_nt_out"};
    check_operands(x);
    const ScalarType dtype = out.scalar_type();
    require(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, x.op);
    require(is_tensor_of(out, dtype, a, {x.num_groups(), x.m(), x.n()}), x.op);
    require(has_contiguous_rows(out), x.op);
    require(are_apart(out, a) && are_apart(out, sfa) && are_apart(out, b) && are_apart(out, sfb) &&
                are_apart(out, k_offsets),
            x.op);
    run(x, out, accumulate);
}

}  // namespace dso
