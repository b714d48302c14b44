#include "torch/ops.h"
#include "torch/rows.h"

namespace dso {
namespace {

/// Whether one stride leads through all heads: the dimensions between the first and the last.
bool has_one_head_stride(const Tensor& x) {
    int64_t expected = -1;  // the stride that the next dimension must have, once one has set it
    for (int64_t dim = x.dim() - 2; dim >= 1; --dim) {
        if (x.size(dim) == 1) continue;
        if (expected != -1 && x.stride(dim) != expected) return false;
        expected = x.stride(dim) * x.size(dim);
    }
    return true;
}

Tensor with_one_head_stride(const Tensor& x) {
    if (has_one_head_stride(x)) return x;
    Tensor copy = empty_rows(x, x.size(x.dim() - 1), x.scalar_type());
    require(aoti_torch_copy_(copy.get(), x.get(), 0) == 0, "could not copy an input");
    return copy;
}

}  // namespace

Tensor rope(const Tensor& x, const Tensor& positions, const Tensor& cos_sin, bool interleaved) {
    const char* op = "rope";
    const dso_dtype dtype = high_precision_dtype(x, op);
    require(x.dim() >= 2, op);
    const int64_t t = x.size(0), d = x.size(x.dim() - 1);
    require(d > 0 && d % 2 == 0 && (x.numel() == 0 || has_contiguous_rows(x)), op);
    require(is_tensor_of(positions, ScalarType::Int, x, {t}) || is_tensor_of(positions, ScalarType::Long, x, {t}), op);
    require(t <= 1 || positions.stride(0) == 1, op);
    require(is_tensor_of(cos_sin, ScalarType::Float, x, {-1, d}) && has_contiguous_rows(cos_sin), op);

    Tensor y = empty_rows(x, d, x.scalar_type());
    const Tensor source = with_one_head_stride(x);
    int64_t num_heads = 1, head_stride = 0;
    for (int64_t dim = x.dim() - 2; dim >= 1; --dim) {
        if (num_heads == 1) head_stride = stride_of(source, dim);
        num_heads *= x.size(dim);
    }
    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const dso_rotation rotation{source.const_data_ptr(),
                                y.mutable_data_ptr(),
                                positions.const_data_ptr(),
                                static_cast<const float*>(cos_sin.const_data_ptr()),
                                t,
                                num_heads,
                                d,
                                cos_sin.size(0),
                                stride_of(source, 0),
                                head_stride,
                                stride_of(cos_sin, 0),
                                dtype,
                                positions.scalar_type() == ScalarType::Long,
                                interleaved};
    require_ok(dso_rope(&rotation, current_stream(device)));
    return y;
}

}  // namespace dso
