// The ops that have a CUDA kernel. Schemas, fakes and references are in deepseek_ops/*.py.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "torch/tensor.h"

namespace dso {

Tensor fp8_gemm_nt(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb, ScalarType out_dtype,
                   bool batch_invariant, bool b_is_constant);

void fp8_gemm_nt_out(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb, Tensor out,
                     bool accumulate, bool batch_invariant, bool b_is_constant);

Tensor m_grouped_fp8_gemm_nt_contiguous(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                                        const Tensor& m_indices, ScalarType out_dtype);
void m_grouped_fp8_gemm_nt_contiguous_out(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                                          const Tensor& m_indices, Tensor out, bool accumulate);
Tensor m_grouped_fp8_gemm_nt_offsets(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                                     const Tensor& offsets, ScalarType out_dtype);
void m_grouped_fp8_gemm_nt_offsets_out(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                                       const Tensor& offsets, Tensor out, bool accumulate);
Tensor m_grouped_fp8_gemm_nt_masked(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                                    const Tensor& masked_m, std::optional<int64_t> expected_m, ScalarType out_dtype,
                                    bool b_is_constant);
void m_grouped_fp8_gemm_nt_masked_out(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                                      const Tensor& masked_m, Tensor out, std::optional<int64_t> expected_m,
                                      bool accumulate, bool b_is_constant);

Tensor m_grouped_bf16_gemm_nt_offsets(const Tensor& a, const Tensor& b, const Tensor& offsets);
void m_grouped_bf16_gemm_nt_offsets_out(const Tensor& a, const Tensor& b, const Tensor& offsets, Tensor out);

Tensor k_grouped_fp8_gemm_nt(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                             const Tensor& k_offsets, ScalarType out_dtype);
void k_grouped_fp8_gemm_nt_out(const Tensor& a, const Tensor& sfa, const Tensor& b, const Tensor& sfb,
                               const Tensor& k_offsets, Tensor out, bool accumulate);

std::tuple<Tensor, Tensor> per_token_cast_to_fp8(const Tensor& x, bool use_ue8m0, bool mn_major, double amax_floor);

std::tuple<Tensor, Tensor> per_block_cast_to_fp8(const Tensor& x, bool use_ue8m0, double amax_floor);

Tensor silu_mul(const Tensor& x);

std::tuple<Tensor, Tensor> silu_mul_cast_to_fp8(const Tensor& x, bool use_ue8m0, bool mn_major);

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps);

std::tuple<Tensor, Tensor> rms_norm_cast_to_fp8(const Tensor& x, const Tensor& weight, double eps, bool use_ue8m0,
                                                bool mn_major);

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_cast_to_fp8(const Tensor& x, const Tensor& residual,
                                                            const Tensor& weight, double eps, bool use_ue8m0,
                                                            bool mn_major);

Tensor rope(const Tensor& x, const Tensor& positions, const Tensor& cos_sin, bool interleaved);

void mla_cache_write(const Tensor& kv_c, const Tensor& k_pe, const Tensor& positions, const Tensor& cos_sin,
                     const Tensor& slot_mapping, Tensor kv_cache, std::optional<Tensor> norm_weight, double eps,
                     bool interleaved, double kv_scale);

Tensor mla_cache_gather(const Tensor& kv_cache, const Tensor& block_table, const Tensor& cu_seqlens, int64_t total,
                        ScalarType out_dtype, double kv_scale);

std::tuple<Tensor, Tensor> merge_attn_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                             const Tensor& lse_b);

std::tuple<Tensor, Tensor> moe_gate(const Tensor& logits, std::optional<Tensor> bias, int64_t num_topk,
                                    int64_t num_groups, int64_t num_topk_groups, std::string scoring_func,
                                    bool norm_topk_prob, double routed_scaling_factor);

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_mapping(const Tensor& topk_idx, int64_t num_experts, int64_t alignment);

/// Whether the kernel is for so many experts.
bool has_moe_mapping_kernel(const StableIValue* stack);

Tensor moe_permute(const Tensor& x, const Tensor& token_idx);

Tensor moe_unpermute(const Tensor& y, const Tensor& row_idx, const Tensor& topk_weights);

std::tuple<Tensor, Tensor> mla_decode(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table,
                                      const Tensor& cache_seqlens, double softmax_scale, bool causal,
                                      std::optional<Tensor> cu_seqlens_q, int64_t head_dim_v, bool batch_invariant,
                                      double kv_scale);
void mla_decode_out(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table, const Tensor& cache_seqlens,
                    Tensor out, Tensor lse, double softmax_scale, bool causal, std::optional<Tensor> cu_seqlens_q,
                    bool batch_invariant, double kv_scale);

/// Whether the kernel is for these arguments: 16-bit queries and cache, 576 and 512 channels.
bool has_mla_decode_kernel(const StableIValue* stack);
bool has_mla_decode_out_kernel(const StableIValue* stack);

std::tuple<Tensor, Tensor> mla_prefill(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                       const Tensor& cu_seqlens_k, double softmax_scale, bool causal);

/// Whether the kernel is for these arguments: 16-bit tensors, 192 and 128 channels, rows that do not overlap.
bool has_mla_prefill_kernel(const StableIValue* stack);

}  // namespace dso
