#include <algorithm>

#include "device/math.cuh"
#include "torch/ops.h"

namespace dso {
namespace {

constexpr int64_t kBlock = 128;

/// What the three layouts have in common: a and out are `[m, .]`, or `[g, m, .]` where the layout is a mask.
struct Operands {
    const Tensor &a, &sfa, &b, &sfb, &layout;
    const char* op;
    bool b_is_constant = false;

    bool masked() const { return a.dim() == 3; }
    int64_t row_dim() const { return masked() ? 1 : 0; }
    int64_t num_rows() const { return a.size(row_dim()); }
};

void check_operands(const Operands& x, int64_t num_layout_entries) {
    require(x.b.dim() == 3, x.op);
    const int64_t g = x.b.size(0), n = x.b.size(1), k = x.b.size(2);
    require(x.masked() ? is_tensor_of(x.a, ScalarType::Float8_e4m3fn, x.a, {g, -1, k})
                       : is_tensor_of(x.a, ScalarType::Float8_e4m3fn, x.a, {-1, k}),
            x.op);
    const int64_t m = x.num_rows(), num_k_blocks = ceil_div(k, kBlock);
    require(x.masked() ? is_tensor_of(x.sfa, ScalarType::Float, x.a, {g, m, num_k_blocks})
                       : is_tensor_of(x.sfa, ScalarType::Float, x.a, {m, num_k_blocks}),
            x.op);
    require(is_tensor_of(x.b, ScalarType::Float8_e4m3fn, x.a, {g, n, k}), x.op);
    require(is_tensor_of(x.sfb, ScalarType::Float, x.a, {g, ceil_div(n, kBlock), num_k_blocks}), x.op);
    require(is_tensor_of(x.layout, ScalarType::Int, x.a, {num_layout_entries}), x.op);
    require(num_layout_entries <= 1 || x.layout.stride(0) == 1, x.op);
    require(has_contiguous_rows(x.a) && has_contiguous_rows(x.b), x.op);
}

void run(const Operands& x, dso_row_layout row_layout, int64_t expected_m, Tensor& out, bool accumulate,
         bool clear_unowned) {
    const int32_t device = x.a.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const int64_t row = x.row_dim(), g = x.b.size(0), n = x.b.size(1), k = x.b.size(2);
    dso_m_grouped_fp8_gemm group{};
    group.gemm = {x.a.const_data_ptr(),
                  static_cast<const float*>(x.sfa.const_data_ptr()),
                  x.b.const_data_ptr(),
                  static_cast<const float*>(x.sfb.const_data_ptr()),
                  out.mutable_data_ptr(),
                  x.num_rows(),
                  n,
                  k,
                  x.a.stride(row),
                  x.b.stride(1),
                  out.stride(row),
                  x.sfa.stride(row),
                  x.sfa.stride(row + 1),
                  x.sfb.stride(1),
                  x.sfb.stride(2),
                  out.scalar_type() == ScalarType::BFloat16 ? DSO_BF16 : DSO_F32,
                  accumulate,
                  true,
                  x.b_is_constant,
                  nullptr};
    if (x.masked()) {
        group.a_stride_group = x.a.stride(0);
        group.sfa_stride_group = x.sfa.stride(0);
        group.d_stride_group = out.stride(0);
    }
    group.b_stride_group = x.b.stride(0);
    group.sfb_stride_group = x.sfb.stride(0);
    group.num_groups = g;
    group.row_layout = row_layout;
    group.layout = static_cast<const int32_t*>(x.layout.const_data_ptr());
    group.expected_m = expected_m;
    group.clear_unowned = clear_unowned;
    Tensor workspace;
    int64_t num_bytes;
    require_ok(dso_m_grouped_fp8_gemm_workspace(&group, &num_bytes));
    if (num_bytes > 0) {
        workspace = empty_strided({num_bytes}, {1}, ScalarType::Byte, x.a);
        group.gemm.workspace = workspace.mutable_data_ptr();
    }
    require_ok(dso_m_grouped_fp8_gemm_nt(&group, current_stream(device)));
}

/// Rows of a group, where they are shared out evenly.
int64_t even_share(const Operands& x) {
    return std::max<int64_t>(ceil_div<int64_t>(x.num_rows(), std::max<int64_t>(x.b.size(0), 1)), 1);
}

/// Of a mask: what the caller expects, else as many as there is room for.
int64_t expected_rows(const Operands& x, std::optional<int64_t> expected_m) {
    return expected_m.value_or(std::max<int64_t>(x.num_rows(), 1));
}

Tensor allocate_and_run(const Operands& x, dso_row_layout row_layout, int64_t expected_m, ScalarType out_dtype) {
    require(out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Float, x.op);
    const int64_t m = x.num_rows(), n = x.b.size(1);
    Tensor out = x.masked() ? empty_strided({x.a.size(0), m, n}, {m * n, n, 1}, out_dtype, x.a)
                            : empty_strided({m, n}, {n, 1}, out_dtype, x.a);
    run(x, row_layout, expected_m, out, false, true);
    return out;
}

void run_out(const Operands& x, dso_row_layout row_layout, int64_t expected_m, Tensor& out, bool accumulate) {
    const ScalarType dtype = out.scalar_type();
    const int64_t m = x.num_rows(), n = x.b.size(1);
    require(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, x.op);
    require(x.masked() ? is_tensor_of(out, dtype, x.a, {x.a.size(0), m, n}) : is_tensor_of(out, dtype, x.a, {m, n}),
            x.op);
    require(has_contiguous_rows(out), x.op);
    require(are_apart(out, x.a) && are_apart(out, x.sfa) && are_apart(out, x.b) && are_apart(out, x.sfb) &&
                are_apart(out, x.layout),
            x.op);
    run(x, row_layout, expected_m, out, accumulate, false);
}

Operands contiguous(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb, const Tensor& m_indices) {
    const Operands x{a, sfa, b, sfb, m_indices, "m_grouped_fp8_gemm_nt_contiguous"};
    require(a.dim() == 2, x.op);
    check_operands(x, a.size(0));
    return x;
}

Operands offsets_of(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb, const Tensor& offsets) {
    const Operands x{a, sfa, b, sfb, offsets, "m_grouped_fp8_gemm_nt_offsets"};
    require(a.dim() == 2 && b.dim() == 3, x.op);
    check_operands(x, b.size(0) + 1);
    return x;
}

Operands masked(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb, const Tensor& masked_m,
                bool b_is_constant) {
    const Operands x{a, sfa, b, sfb, masked_m, "m_grouped_fp8_gemm_nt_masked", b_is_constant};
    require(a.dim() == 3 && b.dim() == 3, x.op);
    check_operands(x, b.size(0));
    return x;
}

}  // namespace

Tensor m_grouped_fp8_gemm_nt_contiguous(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                                        const Tensor& m_indices, ScalarType out_dtype) {
    const Operands x = contiguous(a, sfa, b, sfb, m_indices);
    return allocate_and_run(x, DSO_ROWS_CONTIGUOUS, even_share(x), out_dtype);
}

void m_grouped_fp8_gemm_nt_contiguous_out(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                                          const Tensor& m_indices, Tensor out, bool accumulate) {
    const Operands x = contiguous(a, sfa, b, sfb, m_indices);
    run_out(x, DSO_ROWS_CONTIGUOUS, even_share(x), out, accumulate);
}

Tensor m_grouped_fp8_gemm_nt_offsets(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                                     const Tensor& offsets, ScalarType out_dtype) {
    const Operands x = offsets_of(a, sfa, b, sfb, offsets);
    return allocate_and_run(x, DSO_ROWS_OFFSETS, even_share(x), out_dtype);
}

void m_grouped_fp8_gemm_nt_offsets_out(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                                       const Tensor& offsets, Tensor out, bool accumulate) {
    const Operands x = offsets_of(a, sfa, b, sfb, offsets);
    run_out(x, DSO_ROWS_OFFSETS, even_share(x), out, accumulate);
}

Tensor m_grouped_fp8_gemm_nt_masked(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                                    const Tensor& masked_m, std::optional<int64_t> expected_m, ScalarType out_dtype,
                                    bool b_is_constant) {
    const Operands x = masked(a, sfa, b, sfb, masked_m, b_is_constant);
    return allocate_and_run(x, DSO_ROWS_MASKED, expected_rows(x, expected_m), out_dtype);
}

void m_grouped_fp8_gemm_nt_masked_out(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                                      const Tensor& masked_m, Tensor out, std::optional<int64_t> expected_m,
                                      bool accumulate, bool b_is_constant) {
    const Operands x = masked(a, sfa, b, sfb, masked_m, b_is_constant);
    run_out(x, DSO_ROWS_MASKED, expected_rows(x, expected_m), out, accumulate);
}

}  // namespace dso
