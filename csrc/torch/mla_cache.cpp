#include <cmath>

#include "device/fp8_row.h"
#include "torch/latent.h"
#include "torch/ops.h"
#include "torch/rows.h"

namespace dso {
namespace {

constexpr float kAmaxFloor = 1e-4f;  // AMAX_FLOOR of deepseek_ops/quantize.py

bool is_index_vector(const Tensor& x, const Tensor& like, int64_t length) {
    return (is_tensor_of(x, ScalarType::Int, like, {length}) || is_tensor_of(x, ScalarType::Long, like, {length})) &&
           (length <= 1 || x.stride(0) == 1);
}

bool has_internal_overlap(const Tensor& x) {
    for (int64_t dim = 0; dim < x.dim(); ++dim) {
        if (x.size(dim) > 1 && x.stride(dim) == 0) return true;
    }
    return false;
}

}  // namespace

void mla_cache_write(const Tensor& kv_c, const Tensor& k_pe, const Tensor& positions, const Tensor& cos_sin,
                     const Tensor& slot_mapping, Tensor kv_cache, std::optional<Tensor> norm_weight, double eps,
                     bool interleaved, double kv_scale) {
    const char* op = "mla_cache_write";
    const dso_dtype dtype = high_precision_dtype(kv_c, op);
    require(kv_c.dim() == 2 && k_pe.dim() == 2 && kv_cache.dim() == 3, op);
    const int64_t t = kv_c.size(0), rank = kv_c.size(1), rope_dim = k_pe.size(1);
    const dso_latent_format format = latent_format(kv_cache);
    require(is_tensor_of(k_pe, kv_c.scalar_type(), kv_c, {t, rope_dim}), op);
    require(t == 0 || (has_contiguous_rows(kv_c) && has_contiguous_rows(k_pe)), op);
    require(is_index_vector(positions, kv_c, t) && is_index_vector(slot_mapping, kv_c, t), op);
    require(is_tensor_of(cos_sin, ScalarType::Float, kv_c, {-1, rope_dim}) && cos_sin.is_contiguous(), op);
    require(format != DSO_LATENT_PLAIN || kv_cache.scalar_type() == kv_c.scalar_type(), op);
    require(format == DSO_LATENT_FP8 || kv_scale == 1, op);
    require(is_tensor_of(kv_cache, kv_cache.scalar_type(), kv_c,
                         {-1, -1, format == DSO_LATENT_FP8_BLOCKS ? kFp8RowBytes : rank + rope_dim}),
            op);
    require(kv_cache.numel() == 0 || (has_contiguous_rows(kv_cache) && !has_internal_overlap(kv_cache)), op);
    require(are_apart(kv_cache, kv_c) && are_apart(kv_cache, k_pe) && are_apart(kv_cache, positions) &&
                are_apart(kv_cache, cos_sin) && are_apart(kv_cache, slot_mapping),
            op);
    dso_dtype weight_dtype = dtype;
    if (norm_weight) {
        weight_dtype = high_precision_dtype(*norm_weight, op);
        require(is_tensor_of(*norm_weight, norm_weight->scalar_type(), kv_c, {rank}), op);
        require(has_contiguous_rows(*norm_weight) && are_apart(kv_cache, *norm_weight), op);
    }
    require(eps > 0 && std::isfinite(eps), op);

    const int32_t device = kv_c.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const dso_latent_write write{kv_c.const_data_ptr(),
                                 k_pe.const_data_ptr(),
                                 positions.const_data_ptr(),
                                 static_cast<const float*>(cos_sin.const_data_ptr()),
                                 slot_mapping.const_data_ptr(),
                                 kv_cache.mutable_data_ptr(),
                                 norm_weight ? norm_weight->const_data_ptr() : nullptr,
                                 t,
                                 rank,
                                 rope_dim,
                                 cos_sin.size(0),
                                 kv_cache.size(0),
                                 kv_cache.size(1),
                                 stride_of(kv_c, 0),
                                 stride_of(k_pe, 0),
                                 stride_of(kv_cache, 0),
                                 stride_of(kv_cache, 1),
                                 dtype,
                                 weight_dtype,
                                 format,
                                 positions.scalar_type() == ScalarType::Long,
                                 slot_mapping.scalar_type() == ScalarType::Long,
                                 interleaved,
                                 static_cast<float>(eps),
                                 kAmaxFloor,
                                 static_cast<float>(kv_scale)};
    require_ok(dso_mla_cache_write(&write, current_stream(device)));
}

Tensor mla_cache_gather(const Tensor& kv_cache, const Tensor& block_table, const Tensor& cu_seqlens, int64_t total,
                        ScalarType out_dtype, double kv_scale) {
    const char* op = "mla_cache_gather";
    require(kv_cache.dim() == 3 && kv_cache.size(1) >= 1 && total >= 0, op);
    const dso_latent_format format = latent_format(kv_cache);
    require(format != DSO_LATENT_FP8_BLOCKS || kv_cache.size(2) == kFp8RowBytes, op);
    require(format == DSO_LATENT_FP8 || kv_scale == 1, op);
    require(kv_cache.numel() == 0 || has_contiguous_rows(kv_cache), op);
    require(is_tensor_of(block_table, ScalarType::Int, kv_cache, {-1, -1}), op);
    require(block_table.numel() == 0 || has_contiguous_rows(block_table), op);
    const int64_t b = block_table.size(0), d = format == DSO_LATENT_FP8_BLOCKS ? kFp8RowChannels : kv_cache.size(2);
    require(is_tensor_of(cu_seqlens, ScalarType::Int, kv_cache, {b + 1}) && has_contiguous_rows(cu_seqlens), op);
    require(out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Half || out_dtype == ScalarType::Float, op);
    Tensor out = empty_strided({total, d}, {d > 0 ? d : 1, 1}, out_dtype, kv_cache);
    const int32_t device = kv_cache.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const dso_latent_gather gather{kv_cache.const_data_ptr(),
                                   static_cast<const int32_t*>(block_table.const_data_ptr()),
                                   static_cast<const int32_t*>(cu_seqlens.const_data_ptr()),
                                   out.mutable_data_ptr(),
                                   b,
                                   total,
                                   d,
                                   kv_cache.size(0),
                                   kv_cache.size(1),
                                   block_table.size(1),
                                   stride_of(kv_cache, 0),
                                   stride_of(kv_cache, 1),
                                   stride_of(block_table, 0),
                                   format == DSO_LATENT_PLAIN ? high_precision_dtype(kv_cache, op) : DSO_BF16,
                                   high_precision_dtype(out, op),
                                   format,
                                   static_cast<float>(kv_scale)};
    require_ok(dso_mla_cache_gather(&gather, current_stream(device)));
    return out;
}

}  // namespace dso
