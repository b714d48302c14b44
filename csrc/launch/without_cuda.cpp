// A build without the CUDA kernels: every launch says so. Nothing, in a build with them.
#include "launch/status.h"

#ifndef DSO_WITH_CUDA

namespace {
dso_status no_kernel() { return dso::fail(DSO_NO_KERNEL, "deepseek_ops was built without its CUDA kernels"); }
}  // namespace

extern "C" {

int dso_has_kernels_for(int) { return 0; }

dso_status dso_fp8_gemm_nt(const dso_fp8_gemm*, dso_stream) { return no_kernel(); }

dso_status dso_fp8_gemm_nt_by_plan(const dso_fp8_gemm*, int, int, int, dso_stream) { return no_kernel(); }

dso_status dso_fp8_gemm_workspace(const dso_fp8_gemm*, int64_t*) { return no_kernel(); }

dso_status dso_m_grouped_fp8_gemm_nt(const dso_m_grouped_fp8_gemm*, dso_stream) { return no_kernel(); }

dso_status dso_m_grouped_fp8_gemm_nt_by_plan(const dso_m_grouped_fp8_gemm*, int, dso_stream) { return no_kernel(); }

dso_status dso_m_grouped_fp8_gemm_workspace(const dso_m_grouped_fp8_gemm*, int64_t*) { return no_kernel(); }

dso_status dso_m_grouped_bf16_gemm_nt(const dso_m_grouped_bf16_gemm*, dso_stream) { return no_kernel(); }

dso_status dso_m_grouped_bf16_gemm_nt_by_plan(const dso_m_grouped_bf16_gemm*, int, dso_stream) { return no_kernel(); }

dso_status dso_k_grouped_fp8_gemm_nt(const dso_k_grouped_fp8_gemm*, dso_stream) { return no_kernel(); }

dso_status dso_per_token_cast_to_fp8(const dso_per_token_cast*, dso_stream) { return no_kernel(); }

dso_status dso_per_block_cast_to_fp8(const dso_per_block_cast*, dso_stream) { return no_kernel(); }

dso_status dso_silu_mul(const dso_swiglu*, dso_stream) { return no_kernel(); }

dso_status dso_rms_norm(const dso_norm*, dso_stream) { return no_kernel(); }

dso_status dso_rope(const dso_rotation*, dso_stream) { return no_kernel(); }

dso_status dso_mla_cache_write(const dso_latent_write*, dso_stream) { return no_kernel(); }

dso_status dso_mla_cache_gather(const dso_latent_gather*, dso_stream) { return no_kernel(); }

dso_status dso_merge_attn_states(const dso_attn_states*, dso_stream) { return no_kernel(); }

dso_status dso_moe_gate(const dso_gate*, dso_stream) { return no_kernel(); }

dso_status dso_moe_mapping(const dso_expert_rows*, dso_stream) { return no_kernel(); }

dso_status dso_moe_permute(const dso_row_gather*, dso_stream) { return no_kernel(); }

dso_status dso_moe_unpermute(const dso_row_sum*, dso_stream) { return no_kernel(); }

dso_status dso_plan_mla_decode(const dso_mla_decode*, dso_mla_decode_plan*) { return no_kernel(); }

dso_status dso_mla_decode_by_plan(const dso_mla_decode*, const dso_mla_decode_plan*, dso_stream) { return no_kernel(); }

dso_status dso_mla_prefill(const dso_prefill*, dso_stream) { return no_kernel(); }

}  // extern "C"

#endif
