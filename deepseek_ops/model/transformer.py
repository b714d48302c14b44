"""The decoder: embedding, blocks of attention and feed-forward, final norm and logits.

A forward pass takes the new tokens of any number of sequences, concatenated: prompts of unequal lengths, chunks of
prompts and single decode tokens are the same call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_ops.norm import add_rms_norm
from deepseek_ops.numeric import ceil_div
from deepseek_ops.rope import rope_cos_sin

from .attention import Attention, AttentionForm, absorbed_is_cheaper, norm_weight
from .cache import PAGE_SIZE, Batch, PagedLatentCache
from .config import DeepseekConfig
from .linear import Gemm, Input, linear_float32
from .moe import Mlp, MoE

__all__ = ["Block", "DeepseekModel"]


class Block(nn.Module):
    """One decoder layer: attention, then an MLP or experts, each behind a norm and with a residual connection."""

    def __init__(
        self, config: DeepseekConfig, *, is_moe: bool, gemm: Gemm, dtype: torch.dtype, use_ue8m0: bool = False
    ) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = norm_weight(config.hidden_size, dtype)
        self.self_attn = Attention(config, gemm=gemm, dtype=dtype, use_ue8m0=use_ue8m0)
        self.post_attention_layernorm = norm_weight(config.hidden_size, dtype)
        self.mlp: MoE | Mlp
        if is_moe:
            self.mlp = MoE(config, gemm=gemm, dtype=dtype, use_ue8m0=use_ue8m0)
        else:
            width = config.intermediate_size
            self.mlp = Mlp(config.hidden_size, width, gemm=gemm, dtype=dtype, use_ue8m0=use_ue8m0)

    def forward(
        self, x: Tensor, residual: Tensor | None, batch: Batch, pages: Tensor, cos_sin: Tensor, *, absorbed: bool
    ) -> tuple[Tensor, Tensor]:
        """Takes and returns what the last layer added and the residual stream before it, both `[t, D]`.

        They are added at the next norm, in one pass; the first layer comes with `residual=None`.
        """
        first = self.self_attn.qkv_a_proj
        normed: Input
        if residual is None:
            normed, residual = first.prepare_norm(x, self.input_layernorm, self.eps), x
        else:
            normed, residual = first.prepare_add_norm(x, residual, self.input_layernorm, self.eps)
        x = self.self_attn(normed, batch, pages, cos_sin, absorbed=absorbed)
        if isinstance(self.mlp, MoE):  # its gate takes the values as they are
            normed, residual = add_rms_norm(x, residual, self.post_attention_layernorm, eps=self.eps)
        else:
            first = self.mlp.gate_up_proj
            normed, residual = first.prepare_add_norm(x, residual, self.post_attention_layernorm, self.eps)
        return self.mlp(normed), residual


class DeepseekModel(nn.Module):
    """A DeepSeek-V2 or -V3 model for inference. `load_model` builds one and fills it from a checkpoint.

    Args:
        config: the architecture; its `num_hidden_layers` layers are built.
        gemm: "fp8" for attention's and the experts' projections in FP8, or "bf16" for all in `dtype`.
        dtype: bfloat16 or float32, of everything that is not in FP8, and of the activations.
        attn: the form of attention: "absorbed", "expanded", or "auto" for the cheaper one in each forward pass.
    """

    def __init__(
        self,
        config: DeepseekConfig,
        *,
        gemm: Gemm = "bf16",
        dtype: torch.dtype = torch.bfloat16,
        attn: AttentionForm = "auto",
    ) -> None:
        super().__init__()
        if dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"a model's dtype must be bfloat16 or float32, got {dtype}")
        self.config = config
        self.gemm: Gemm = gemm
        self.dtype = dtype
        self.cache_dtype = dtype
        self.attn: AttentionForm = attn
        use_ue8m0 = config.quantization is not None and config.quantization.scale_fmt == "ue8m0"
        self.use_ue8m0 = use_ue8m0
        self.embed_tokens = nn.Parameter(
            torch.empty(config.vocab_size, config.hidden_size, dtype=dtype), requires_grad=False
        )
        self.layers = nn.ModuleList(
            Block(config, is_moe=config.is_moe_layer(i), gemm=gemm, dtype=dtype, use_ue8m0=use_ue8m0)
            for i in range(config.num_hidden_layers)
        )
        self.norm = norm_weight(config.hidden_size, dtype)
        self.lm_head = None if config.tie_word_embeddings else nn.Parameter(torch.empty_like(self.embed_tokens), False)
        """None: the embedding is the head too."""
        self.mtp = nn.ModuleList()
        """The multi-token prediction modules, if they were added (`mtp.add_mtp`)."""
        self.cos_sin: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.device

    def make_cache(self, lengths: Sequence[int]) -> PagedLatentCache:
        """An empty cache in the model's `cache_dtype` with pages for sequences of these lengths, in tokens."""
        num_pages = sum(ceil_div(length, PAGE_SIZE) for length in lengths)
        num_layers = len(self.layers) + len(self.mtp)
        return PagedLatentCache(
            self.config, num_pages, num_layers=num_layers, dtype=self.cache_dtype, device=self.device
        )

    def forward(self, token_ids: Tensor, batch: Batch, cache: PagedLatentCache, *, all_logits: bool = False) -> Tensor:
        """Runs the new tokens through the model and writes their latents to the cache.

        Args:
            token_ids: `[t]` int64, the new tokens of every sequence, concatenated.
            batch: where they belong, from `cache.append`.
            cache: the cache that `batch` came from (written).
            all_logits: logits of every new token, not of each sequence's last.

        Returns:
            `[b, vocab_size]` float32, or `[t, vocab_size]` with `all_logits`.
        """
        hidden = self.hidden_states(token_ids, batch, cache)
        if not all_logits and batch.uniform_seqlen_q != 1:
            hidden = hidden[batch.cu_seqlens_q[1:] - 1]
        return self.logits(hidden)

    def hidden_states(self, token_ids: Tensor, batch: Batch, cache: PagedLatentCache) -> Tensor:
        """As `forward`, up to the final norm: `[t, D]`."""
        absorbed = self.use_absorbed(batch)
        cos_sin = self.rope_table()
        x, residual = self.embed(token_ids), None
        for block, pages in zip(self.layers, cache.pages, strict=False):
            x, residual = block(x, residual, batch, pages, cos_sin, absorbed=absorbed)
        assert residual is not None
        return add_rms_norm(x, residual, self.norm, eps=self.config.rms_norm_eps)[0]

    def embed(self, token_ids: Tensor) -> Tensor:
        """`[t]` to `[t, D]`."""
        return F.embedding(token_ids, self.embed_tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[t, D]`, after a final norm, to float32 logits `[t, vocab_size]`."""
        return linear_float32(hidden, self.embed_tokens if self.lm_head is None else self.lm_head)

    def use_absorbed(self, batch: Batch) -> bool:
        """Which form of attention this batch gets."""
        return absorbed_is_cheaper(self.config, batch) if self.attn == "auto" else self.attn == "absorbed"

    def can_be_captured(self, batch: Batch) -> bool:
        """Whether a pass over this batch can be captured in a CUDA graph: whether it reads no value on the host.

        Two things do: expanded attention, which makes as many keys as there are tokens, and experts in float32, whose
        grouped GEMM is a loop of torch's over the groups.
        """
        has_host_loop = self.gemm == "bf16" and self.dtype == torch.float32 and self.config.n_routed_experts is not None
        return self.device.type == "cuda" and self.use_absorbed(batch) and not has_host_loop

    def rope_table(self) -> Tensor:
        """cos and sin of every position, computed once, in float32."""
        if self.cos_sin is None or self.cos_sin.device != self.device:
            config = self.config
            self.cos_sin = rope_cos_sin(
                config.max_position_embeddings,
                config.qk_rope_head_dim,
                base=config.rope_theta,
                scaling=config.rope_scaling,
            ).to(self.device)
        return self.cos_sin
