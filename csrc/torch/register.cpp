// Nothing but the list of ops that have a CUDA kernel.
#include "torch/fallback.h"
#include "torch/ops.h"

#ifdef DSO_WITH_CUDA

// One line an op: its kernel where the GPU has one, its reference elsewhere.
#define DSO_REGISTER(library, op)                                                 \
    do {                                                                          \
        static constexpr char name[] = #op;                                       \
        library.impl(name, &dso::kernel_or_reference<name, TORCH_BOX(&dso::op)>); \
    } while (0)

// The same where the kernel is not for all arguments.
#define DSO_REGISTER_WHERE(library, op, is_for)                                                \
    do {                                                                                       \
        static constexpr char name[] = #op;                                                    \
        library.impl(name, &dso::kernel_or_reference<name, TORCH_BOX(&dso::op), dso::is_for>); \
    } while (0)

STABLE_TORCH_LIBRARY_IMPL(deepseek_ops, CUDA, library) {
    DSO_REGISTER(library, fp8_gemm_nt);
    DSO_REGISTER(library, fp8_gemm_nt_out);
    DSO_REGISTER(library, m_grouped_fp8_gemm_nt_contiguous);
    DSO_REGISTER(library, m_grouped_fp8_gemm_nt_contiguous_out);
    DSO_REGISTER(library, m_grouped_fp8_gemm_nt_offsets);
    DSO_REGISTER(library, m_grouped_fp8_gemm_nt_offsets_out);
    DSO_REGISTER(library, m_grouped_fp8_gemm_nt_masked);
    DSO_REGISTER(library, m_grouped_fp8_gemm_nt_masked_out);
    DSO_REGISTER(library, m_grouped_bf16_gemm_nt_offsets);
    DSO_REGISTER(library, m_grouped_bf16_gemm_nt_offsets_out);
    DSO_REGISTER(library, k_grouped_fp8_gemm_nt);
    DSO_REGISTER(library, k_grouped_fp8_gemm_nt_out);
    DSO_REGISTER(library, per_token_cast_to_fp8);
    DSO_REGISTER(library, per_block_cast_to_fp8);
    DSO_REGISTER(library, silu_mul);
    DSO_REGISTER(library, silu_mul_cast_to_fp8);
    DSO_REGISTER(library, rms_norm);
    DSO_REGISTER(library, add_rms_norm);
    DSO_REGISTER(library, rms_norm_cast_to_fp8);
    DSO_REGISTER(library, add_rms_norm_cast_to_fp8);
    DSO_REGISTER(library, rope);
    DSO_REGISTER(library, mla_cache_write);
    DSO_REGISTER(library, mla_cache_gather);
    DSO_REGISTER(library, merge_attn_states);
    DSO_REGISTER(library, moe_gate);
    DSO_REGISTER_WHERE(library, moe_mapping, has_moe_mapping_kernel);
    DSO_REGISTER(library, moe_permute);
    DSO_REGISTER(library, moe_unpermute);
    DSO_REGISTER_WHERE(library, mla_decode, has_mla_decode_kernel);
    DSO_REGISTER_WHERE(library, mla_decode_out, has_mla_decode_out_kernel);
    DSO_REGISTER_WHERE(library, mla_prefill, has_mla_prefill_kernel);
}

#endif
