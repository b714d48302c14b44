#include "torch/latent.h"
#include "torch/ops.h"

namespace dso {
namespace {

constexpr int64_t kKeyDim = 576, kValueDim = 512;
constexpr int64_t kFp8RowBytes = 656;

/// The operands of one call, checked.
struct MlaDecode {
    const Tensor &q, &kv_cache, &block_table, &cache_seqlens;
    const std::optional<Tensor>& cu_seqlens_q;
    double softmax_scale, kv_scale;
    bool causal, batch_invariant;

    bool is_ragged() const { return cu_seqlens_q.has_value(); }
    int64_t num_requests() const { return block_table.size(0); }
    int64_t num_queries() const { return q.size(q.dim() - 3); }  // of a request, or of all
    int64_t num_heads() const { return q.size(q.dim() - 2); }

    void check() const {
        const ScalarType dtype = q.scalar_type();
        require(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "mla_decode: q");
        require(is_ragged() ? is_tensor_of(q, dtype, q, {-1, -1, kKeyDim})
                            : is_tensor_of(q, dtype, q, {-1, -1, -1, kKeyDim}),
                "mla_decode: q");
        require(num_heads() >= 1, "mla_decode: q");
        const dso_latent_format format = latent_format(kv_cache);
        require(format != DSO_LATENT_PLAIN || kv_cache.scalar_type() == dtype, "mla_decode: kv_cache");
        require(format == DSO_LATENT_FP8 || kv_scale == 1, "mla_decode: kv_scale");
        require(is_tensor_of(kv_cache, kv_cache.scalar_type(), q,
                             {-1, -1, format == DSO_LATENT_FP8_BLOCKS ? kFp8RowBytes : kKeyDim}) &&
                    kv_cache.size(1) >= 1,
                "mla_decode: kv_cache");
        require(is_tensor_of(block_table, ScalarType::Int, q, {is_ragged() ? -1 : q.size(0), -1}),
                "mla_decode: block_table");
        require(is_tensor_of(cache_seqlens, ScalarType::Int, q, {num_requests()}), "mla_decode: cache_seqlens");
        require(has_contiguous_rows(q) && has_contiguous_rows(kv_cache) && has_contiguous_rows(block_table) &&
                    has_contiguous_rows(cache_seqlens),
                "mla_decode: rows must be contiguous");
        require(!is_ragged() || (is_tensor_of(*cu_seqlens_q, ScalarType::Int, q, {num_requests() + 1}) &&
                                 has_contiguous_rows(*cu_seqlens_q)),
                "mla_decode: cu_seqlens_q");
    }

    void run(Tensor& out, Tensor& lse) const {
        const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
        const int64_t queries = q.dim() - 3;  // the dimension
        dso_mla_decode decode{q.const_data_ptr(),
                              kv_cache.const_data_ptr(),
                              static_cast<const int32_t*>(block_table.const_data_ptr()),
                              static_cast<const int32_t*>(cache_seqlens.const_data_ptr()),
                              is_ragged() ? static_cast<const int32_t*>(cu_seqlens_q->const_data_ptr()) : nullptr,
                              out.mutable_data_ptr(),
                              static_cast<float*>(lse.mutable_data_ptr()),
                              nullptr,
                              num_requests(),
                              num_queries(),
                              num_heads(),
                              kv_cache.size(0),
                              kv_cache.size(1),
                              block_table.size(1),
                              is_ragged() ? 0 : stride_of(q, 0),
                              stride_of(q, queries),
                              stride_of(q, queries + 1),
                              stride_of(kv_cache, 0),
                              stride_of(kv_cache, 1),
                              stride_of(block_table, 0),
                              is_ragged() ? 0 : stride_of(out, 0),
                              stride_of(out, queries),
                              stride_of(out, queries + 1),
                              q.scalar_type() == ScalarType::BFloat16 ? DSO_BF16 : DSO_F16,
                              softmax_scale,
                              causal,
                              latent_format(kv_cache),
                              static_cast<float>(kv_scale),
                              batch_invariant};
        dso_mla_decode_plan plan;
        require_ok(dso_plan_mla_decode(&decode, &plan));
        Tensor workspace;
        if (plan.workspace_bytes > 0) {
            workspace = empty_strided({plan.workspace_bytes}, {1}, ScalarType::Byte, q);
            decode.workspace = workspace.mutable_data_ptr();
        }
        require_ok(dso_mla_decode_by_plan(&decode, &plan, current_stream(q.get_device_index())));
    }
};

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
    if (dtypes[1] == aoti_torch_dtype_uint8()) return widths[1] == kFp8RowBytes;
    return widths[1] == kKeyDim && (dtypes[1] == dtypes[0] || dtypes[1] == aoti_torch_dtype_float8_e4m3fn());
}

}  // namespace

bool has_mla_decode_kernel(const StableIValue* stack) {
    return are_of_kernels_types(stack) && torch::stable::detail::to<int64_t>(stack[7]) == kValueDim;
}

bool has_mla_decode_out_kernel(const StableIValue* stack) {
    const auto out = torch::stable::detail::to<AtenTensorHandle>(stack[4]);
    int64_t dim, width;
    return are_of_kernels_types(stack) && aoti_torch_get_dim(out, &dim) == 0 && dim > 0 &&
           aoti_torch_get_size(out, dim - 1, &width) == 0 && width == kValueDim;
}

std::tuple<Tensor, Tensor> mla_decode(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                                      const Tensor& cache_seqlens, double softmax_scale, bool causal,
                                      std::optional<Tensor> cu_seqlens_q, int64_t, bool batch_invariant,
                                      double kv_scale) {
    const MlaDecode call{q,        kv_cache, block_table,    cache_seqlens, cu_seqlens_q, softmax_scale,
                         kv_scale, causal,   batch_invariant};
    call.check();
    const int64_t h = call.num_heads(), s_q = call.num_queries(), b = q.size(0);
    Tensor out, lse;
    if (call.is_ragged()) {
        out = empty_strided({s_q, h, kValueDim}, {h * kValueDim, kValueDim, 1}, q.scalar_type(), q);
        lse = empty_strided({s_q, h}, {h, 1}, ScalarType::Float, q);
    } else {
        out = empty_strided({b, s_q, h, kValueDim}, {s_q * h * kValueDim, h * kValueDim, kValueDim, 1}, q.scalar_type(),
                            q);
        lse = empty_strided({b, s_q, h}, {s_q * h, h, 1}, ScalarType::Float, q);
    }
    call.run(out, lse);
    return {out, lse};
}

void mla_decode_out(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table, const Tensor& cache_seqlens,
                    Tensor out, Tensor lse, double softmax_scale, bool causal, std::optional<Tensor> cu_seqlens_q,
                    bool batch_invariant, double kv_scale) {
    const MlaDecode call{q,        kv_cache, block_table,    cache_seqlens, cu_seqlens_q, softmax_scale,
                         kv_scale, causal,   batch_invariant};
    call.check();
    const int64_t h = call.num_heads(), s_q = call.num_queries(), b = q.size(0);
    require((call.is_ragged() ? is_tensor_of(out, q.scalar_type(), q, {s_q, h, kValueDim})
                              : is_tensor_of(out, q.scalar_type(), q, {b, s_q, h, kValueDim})) &&
                has_contiguous_rows(out),
            "mla_decode_out: out");
    require(call.is_ragged() ? is_tensor_of(lse, ScalarType::Float, q, {s_q, h})
                             : is_tensor_of(lse, ScalarType::Float, q, {b, s_q, h}),
            "mla_decode_out: lse");
    int64_t stride = 1;
    for (int64_t dim = lse.dim() - 1; dim >= 0; stride *= lse.size(dim--)) {
        require(lse.numel() == 0 || lse.size(dim) == 1 || lse.stride(dim) == stride,
                "mla_decode_out: lse must be contiguous");
        require(out.size(dim) <= 1 || out.stride(dim) != 0, "mla_decode_out: out overlaps itself");
    }
    for (const Tensor* input : {&q, &kv_cache, &block_table, &cache_seqlens})
        require(are_apart(out, *input) && are_apart(lse, *input), "mla_decode_out: an output overlaps an input");
    if (call.is_ragged())
        require(are_apart(out, *cu_seqlens_q) && are_apart(lse, *cu_seqlens_q),
                "mla_decode_out: an output overlaps cu_seqlens_q");
    require(are_apart(out, lse), "mla_decode_out: out overlaps lse");
    call.run(out, lse);
}

}  // namespace dso
