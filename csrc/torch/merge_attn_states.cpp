#include "torch/ops.h"
#include "torch/rows.h"

namespace dso {
namespace {

bool has_sizes_of(const Tensor& x, const Tensor& like, int64_t dims) {
    if (x.dim() != dims || x.is_cpu() != like.is_cpu() || x.get_device_index() != like.get_device_index()) return false;
    for (int64_t dim = 0; dim < dims; ++dim) {
        if (x.size(dim) != like.size(dim)) return false;
    }
    return true;
}

Tensor contiguous(const Tensor& x) {
    if (x.is_contiguous()) return x;
    Tensor copy = empty_rows(x, x.size(x.dim() - 1), x.scalar_type());
    require(aoti_torch_copy_(copy.get(), x.get(), 0) == 0, "could not copy an input");
    return copy;
}

}  // namespace

std::tuple<Tensor, Tensor> merge_attn_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                             const Tensor& lse_b) {
    const char* op = "merge_attn_states";
    const dso_dtype dtype = high_precision_dtype(out_a, op);
    const int64_t dim = out_a.dim();
    require(dim >= 2, op);
    require(out_b.scalar_type() == out_a.scalar_type() && has_sizes_of(out_b, out_a, dim), op);
    require(lse_a.scalar_type() == ScalarType::Float && has_sizes_of(lse_a, out_a, dim - 1), op);
    require(lse_b.scalar_type() == ScalarType::Float && has_sizes_of(lse_b, out_a, dim - 1), op);
    require(out_a.numel() == 0 || (has_contiguous_rows(out_a) && has_contiguous_rows(out_b)), op);

    const Tensor a = with_one_group_stride(out_a), b = with_one_group_stride(out_b);
    const Tensor lse_of_a = contiguous(lse_a), lse_of_b = contiguous(lse_b);
    const Rows rows = rows_of(a), b_rows = rows_of(b);
    Tensor out = empty_rows(out_a, rows.k, out_a.scalar_type());
    Tensor lse = empty_rows(lse_a, lse_a.size(dim - 2), ScalarType::Float);
    const int32_t device = out_a.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const dso_attn_states states{a.const_data_ptr(),
                                 b.const_data_ptr(),
                                 static_cast<const float*>(lse_of_a.const_data_ptr()),
                                 static_cast<const float*>(lse_of_b.const_data_ptr()),
                                 out.mutable_data_ptr(),
                                 static_cast<float*>(lse.mutable_data_ptr()),
                                 rows.num_groups,
                                 rows.m,
                                 rows.k,
                                 rows.stride_group,
                                 rows.stride_m,
                                 b_rows.stride_group,
                                 b_rows.stride_m,
                                 dtype};
    require_ok(dso_merge_attn_states(&states, current_stream(device)));
    return {out, lse};
}

}  // namespace dso
