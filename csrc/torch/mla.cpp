#include "torch/ops.h"

namespace dso {
namespace {

constexpr int64_t kKeyDim = 576, kValueDim = 512;
constexpr int64_t kFp8RowBytes = 656;

/// Where there is more than one of them, how far apart they are. (torch leaves any number where there is not.)
int64_t stride_of(const Tensor& x, int64_t dim) { return x.size(dim) > 1 ? x.stride(dim) : 0; }

bool is_fp8(const Tensor& kv_cache) { return kv_cache.scalar_type() == ScalarType::Byte; }

void check_operands(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table, const Tensor& cache_seqlens) {
    const ScalarType dtype = q.scalar_type();
    require(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "mla_decode: q");
    require(is_tensor_of(q, dtype, q, {-1, -1, -1, kKeyDim}) && q.size(2) >= 1, "mla_decode: q");
    const int64_t b = q.size(0);
    const bool fp8 = is_fp8(kv_cache);
    require(is_tensor_of(kv_cache, fp8 ? ScalarType::Byte : dtype, q, {-1, -1, fp8 ? kFp8RowBytes : kKeyDim}) &&
                kv_cache.size(1) >= 1,
            "mla_decode: kv_cache");
    require(is_tensor_of(block_table, ScalarType::Int, q, {b, -1}), "mla_decode: block_table");
    require(is_tensor_of(cache_seqlens, ScalarType::Int, q, {b}), "mla_decode: cache_seqlens");
    require(has_contiguous_rows(q) && has_contiguous_rows(kv_cache) && has_contiguous_rows(block_table) &&
                has_contiguous_rows(cache_seqlens),
            "mla_decode: rows must be contiguous");
}

void run_mla_decode(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table, const Tensor& cache_seqlens,
                    Tensor& out, Tensor& lse, double softmax_scale, bool causal) {
    const int32_t device = q.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    dso_mla_decode decode{q.const_data_ptr(),
                          kv_cache.const_data_ptr(),
                          static_cast<const int32_t*>(block_table.const_data_ptr()),
                          static_cast<const int32_t*>(cache_seqlens.const_data_ptr()),
                          out.mutable_data_ptr(),
                          static_cast<float*>(lse.mutable_data_ptr()),
                          nullptr,
                          q.size(0),
                          q.size(1),
                          q.size(2),
                          kv_cache.size(0),
                          kv_cache.size(1),
                          block_table.size(1),
                          stride_of(q, 0),
                          stride_of(q, 1),
                          stride_of(q, 2),
                          stride_of(kv_cache, 0),
                          stride_of(kv_cache, 1),
                          stride_of(block_table, 0),
                          stride_of(out, 0),
                          stride_of(out, 1),
                          stride_of(out, 2),
                          q.scalar_type() == ScalarType::BFloat16 ? DSO_BF16 : DSO_F16,
                          softmax_scale,
                          causal,
                          is_fp8(kv_cache)};
    dso_mla_decode_plan plan;
    require_ok(dso_plan_mla_decode(&decode, &plan));
    Tensor workspace;
    if (plan.workspace_bytes > 0) {
        workspace = empty_strided({plan.workspace_bytes}, {1}, ScalarType::Byte, q);
        decode.workspace = workspace.mutable_data_ptr();
    }
    require_ok(dso_mla_decode_by_plan(&decode, &plan, current_stream(device)));
}

/// Whether the kernel takes this query and this cache; the reference takes the others.
bool are_of_kernels_types(const StableIValue* stack) {
    int32_t dtypes[2];
    int64_t widths[2];
    for (int i = 0; i < 2; ++i) {
        const auto x = torch::stable::detail::to<AtenTensorHandle>(stack[i]);
        int64_t dim;
        if (aoti_torch_get_dtype(x, &dtypes[i]) != 0) return false;
        if (aoti_torch_get_dim(x, &dim) != 0 || dim == 0) return false;
        if (aoti_torch_get_size(x, dim - 1, &widths[i]) != 0) return false;
    }
    const bool has_16_bits = dtypes[0] == aoti_torch_dtype_bfloat16() || dtypes[0] == aoti_torch_dtype_float16();
    if (!has_16_bits || widths[0] != kKeyDim) return false;
    return dtypes[1] == aoti_torch_dtype_uint8() ? widths[1] == kFp8RowBytes
                                                 : dtypes[1] == dtypes[0] && widths[1] == kKeyDim;
}

bool is_none(StableIValue x) { return x == torch::stable::detail::from(std::nullopt); }

}  // namespace

bool has_mla_decode_kernel(const StableIValue* stack) {
    return are_of_kernels_types(stack) && is_none(stack[6]) &&
           torch::stable::detail::to<int64_t>(stack[7]) == kValueDim;
}

bool has_mla_decode_out_kernel(const StableIValue* stack) {
    const auto out = torch::stable::detail::to<AtenTensorHandle>(stack[4]);
    int64_t dim, width;
    return are_of_kernels_types(stack) && is_none(stack[8]) && aoti_torch_get_dim(out, &dim) == 0 && dim > 0 &&
           aoti_torch_get_size(out, dim - 1, &width) == 0 && width == kValueDim;
}

std::tuple<Tensor, Tensor> mla_decode(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                                      const Tensor& cache_seqlens, double softmax_scale, bool causal,
                                      std::optional<Tensor>, int64_t) {
    check_operands(q, kv_cache, block_table, cache_seqlens);
    const int64_t b = q.size(0), s_q = q.size(1), h = q.size(2);
    Tensor out =
        empty_strided({b, s_q, h, kValueDim}, {s_q * h * kValueDim, h * kValueDim, kValueDim, 1}, q.scalar_type(), q);
    Tensor lse = empty_strided({b, s_q, h}, {s_q * h, h, 1}, ScalarType::Float, q);
    run_mla_decode(q, kv_cache, block_table, cache_seqlens, out, lse, softmax_scale, causal);
    return {out, lse};
}

void mla_decode_out(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table, const Tensor& cache_seqlens,
                    Tensor out, Tensor lse, double softmax_scale, bool causal, std::optional<Tensor>) {
    check_operands(q, kv_cache, block_table, cache_seqlens);
    const int64_t b = q.size(0), s_q = q.size(1), h = q.size(2);
    require(is_tensor_of(out, q.scalar_type(), q, {b, s_q, h, kValueDim}) && has_contiguous_rows(out),
            "mla_decode_out: out");
    require(is_tensor_of(lse, ScalarType::Float, q, {b, s_q, h}), "mla_decode_out: lse");
    int64_t stride = 1;
    for (int64_t dim = 2; dim >= 0; stride *= lse.size(dim--)) {
        require(lse.numel() == 0 || lse.size(dim) == 1 || lse.stride(dim) == stride,
                "mla_decode_out: lse must be contiguous");
        require(out.size(dim) <= 1 || out.stride(dim) != 0, "mla_decode_out: out overlaps itself");
    }
    for (const Tensor* input : {&q, &kv_cache, &block_table, &cache_seqlens})
        require(are_apart(out, *input) && are_apart(lse, *input), "mla_decode_out: an output overlaps an input");
    require(are_apart(out, lse), "mla_decode_out: out overlaps lse");
    run_mla_decode(q, kv_cache, block_table, cache_seqlens, out, lse, softmax_scale, causal);
}

}  // namespace dso
