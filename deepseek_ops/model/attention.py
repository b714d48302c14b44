"""Multi-head latent attention (MLA), in its two forms.

Both project to the same queries and the same latent, write the latent to the cache and read keys from there:

- expanded (prefill): every cached latent is expanded to each head's key and value, `k_h = [W_UK,h c; k_pe]` and
  `v_h = W_UV,h c`, for ordinary multi-head attention;
- absorbed (decode): `W_UK` moves to the query and `W_UV` to the output, `q~_h = W_UK,h^T q_nope,h`, so that all heads
  attend over the latents themselves, one shared key and value per token.

They are the same function. Per pair of query and key the absorbed form computes more, but it expands nothing.

Source: DeepSeek-V2 report (arXiv:2405.04434), section 2.1 and appendix B.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from deepseek_ops.mla import mla_decode, mla_prefill
from deepseek_ops.mla_cache import mla_cache_gather, mla_cache_write
from deepseek_ops.rope import rope

from .cache import Batch
from .config import DeepseekConfig
from .linear import Gemm, Input, Linear, make_linear

__all__ = ["Attention", "AttentionForm", "absorbed_is_cheaper", "norm_weight"]

AttentionForm = Literal["absorbed", "expanded", "auto"]

LATENT_NORM_EPS = 1e-6
"""Of the two norms inside attention, whatever the config's `rms_norm_eps`, which is for those around it."""


class Attention(nn.Module):
    """One layer's MLA.

    Weights, with `H` heads: `qkv_a_proj` stacks what reads the layer's input, the query's projection (`q_a_proj`, or
    `q_proj` where there is no `q_lora_rank`) and `kv_a_proj_with_mqa`; `q_b_proj` `[H * (nope + rope), q_lora_rank]`;
    `kv_b_proj` `[H * (nope + v), kv_lora_rank]`, per head W_UK then W_UV, which is never in FP8: both forms use the
    same dequantized values, so they agree, and the absorbed form needs them anyway; `o_proj` `[D, H * v]`.
    """

    def __init__(self, config: DeepseekConfig, *, gemm: Gemm, dtype: torch.dtype, use_ue8m0: bool = False) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.kv_lora_rank = config.kv_lora_rank
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.softmax_scale = config.softmax_scale
        self.interleaved = config.rope_interleave

        q_dim = self.num_heads * config.qk_head_dim
        kv_b_dim = self.num_heads * (self.nope_dim + self.v_head_dim)

        def linear(in_features: int, *out_features: int) -> Linear:
            return make_linear(in_features, out_features, gemm=gemm, dtype=dtype, use_ue8m0=use_ue8m0)

        self.qkv_a_proj = linear(config.hidden_size, config.q_lora_rank or q_dim, config.latent_dim)
        self.q_a_layernorm = norm_weight(config.q_lora_rank, dtype) if config.q_lora_rank else None
        self.q_b_proj = linear(config.q_lora_rank, q_dim) if config.q_lora_rank else None
        self.kv_a_layernorm = norm_weight(config.kv_lora_rank, dtype)
        self.kv_b_proj = Linear(config.kv_lora_rank, (kv_b_dim,), dtype=dtype)
        self.o_proj = linear(self.num_heads * self.v_head_dim, config.hidden_size)

    def forward(self, x: Input, batch: Batch, pages: Tensor, cos_sin: Tensor, *, absorbed: bool) -> Tensor:
        """Attends from the new tokens to their sequences, and writes their latents to the cache.

        Args:
            x: `[t, D]`, the new tokens, normalised, as `qkv_a_proj` takes them.
            batch: where they belong.
            pages: this layer's pages of the cache (written).
            cos_sin: `[max_position, rope]` float32, see `rope_cos_sin`.
            absorbed: which form.

        Returns:
            `[t, D]`.
        """
        q, kv = self.qkv_a_proj.split(self.qkv_a_proj(x))
        kv_c, k_pe = torch.split(kv, [self.kv_lora_rank, self.rope_dim], dim=-1)
        mla_cache_write(
            kv_c,
            k_pe,
            batch.positions,
            cos_sin,
            batch.slot_mapping,
            pages,
            norm_weight=self.kv_a_layernorm,
            eps=LATENT_NORM_EPS,
            interleaved=self.interleaved,
        )

        if self.q_b_proj is not None and self.q_a_layernorm is not None:
            q = self.q_b_proj(self.q_b_proj.prepare_norm(q, self.q_a_layernorm, LATENT_NORM_EPS))
        q = q.reshape(-1, self.num_heads, self.nope_dim + self.rope_dim)
        q_nope, q_pe = torch.split(q, [self.nope_dim, self.rope_dim], dim=-1)
        q_pe = rope(q_pe, batch.positions, cos_sin, interleaved=self.interleaved)

        attend = self.attend_absorbed if absorbed else self.attend_expanded
        return self.o_proj(attend(q_nope, q_pe, batch, pages).flatten(1))

    def attend_expanded(self, q_nope: Tensor, q_pe: Tensor, batch: Batch, pages: Tensor) -> Tensor:
        """Attention over each head's own keys and values, expanded from the cached latents; `[t, H, v]`."""
        latents = mla_cache_gather(
            pages, batch.block_table, batch.cu_seqlens_k, sum(batch.seqlens_k), out_dtype=q_nope.dtype
        )
        kv_c, k_pe = torch.split(latents, [self.kv_lora_rank, self.rope_dim], dim=-1)
        kv = self.kv_b_proj(kv_c).view(-1, self.num_heads, self.nope_dim + self.v_head_dim)
        k_nope, v = torch.split(kv, [self.nope_dim, self.v_head_dim], dim=-1)
        k = torch.cat([k_nope, k_pe.unsqueeze(1).expand(-1, self.num_heads, -1)], dim=-1)
        q = torch.cat([q_nope, q_pe], dim=-1)
        out, _ = mla_prefill(
            q, k, v, batch.cu_seqlens_q, batch.cu_seqlens_k, softmax_scale=self.softmax_scale, causal=True
        )
        return out

    def attend_absorbed(self, q_nope: Tensor, q_pe: Tensor, batch: Batch, pages: Tensor) -> Tensor:
        """Attention of all heads over the cached latents; `[t, H, v]`."""
        w_uk, w_uv = self.absorption()
        # Both products go where they are read from, without a copy: latents beside the rotated part, values by token.
        q = q_nope.new_empty(q_nope.shape[0], self.num_heads, self.kv_lora_rank + self.rope_dim)
        q_latent, q_rotated = torch.split(q, [self.kv_lora_rank, self.rope_dim], dim=-1)
        torch.bmm(q_nope.transpose(0, 1), w_uk, out=q_latent.transpose(0, 1))
        q_rotated.copy_(q_pe)
        s_q = batch.uniform_seqlen_q
        if s_q is not None:
            q = q.view(-1, s_q, self.num_heads, q.shape[-1])
        out, _ = mla_decode(
            q,
            pages,
            batch.block_table,
            batch.cache_seqlens,
            softmax_scale=self.softmax_scale,
            causal=True,
            cu_seqlens_q=None if s_q is not None else batch.cu_seqlens_q,
            head_dim_v=self.kv_lora_rank,
        )
        out = out.view(-1, self.num_heads, self.kv_lora_rank)
        values = out.new_empty(out.shape[0], self.num_heads, self.v_head_dim)
        torch.bmm(out.transpose(0, 1), w_uv.transpose(1, 2), out=values.transpose(0, 1))
        return values

    def absorption(self) -> tuple[Tensor, Tensor]:
        """W_UK `[H, nope, kv_lora_rank]` and W_UV `[H, v, kv_lora_rank]`, views of `kv_b_proj`."""
        w_kv = self.kv_b_proj.weight.view(self.num_heads, -1, self.kv_lora_rank)
        w_uk, w_uv = torch.split(w_kv, [self.nope_dim, self.v_head_dim], dim=1)
        return w_uk, w_uv


def absorbed_is_cheaper(config: DeepseekConfig, batch: Batch) -> bool:
    """Whether the absorbed form needs fewer operations for this batch.

    With `s` new and `p` earlier tokens per sequence, expanding costs `(p + s) 2 C (nope + v)` and attending
    `2 s p (nope + rope + v)` per head; absorbing costs `2 s C (nope + v)` and attending `2 s p (2 C + rope)`, where
    `C = kv_lora_rank`. So without earlier tokens the expanded form is never worse, and with them the absorbed one is
    cheaper for fewer than `C (nope + v) / (2 C - nope - v)` new tokens per sequence, 170 in every release.
    """
    if not batch.has_prefix:
        return False
    c, nope_v = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    per_pair = 2 * c - nope_v
    return per_pair <= 0 or max(batch.seqlens_q) * per_pair < c * nope_v


def norm_weight(width: int, dtype: torch.dtype) -> nn.Parameter:
    """The weight of an RMSNorm."""
    return nn.Parameter(torch.empty(width, dtype=dtype), requires_grad=False)
