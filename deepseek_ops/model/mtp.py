"""Multi-token prediction: one more decoder layer that drafts the token after the next.

With `h_i` the main model's output at position `i` (after its final norm) and `t_{i+1}` the token that follows,

    h'_i = block(eh_proj [enorm(Emb(t_{i+1})); hnorm(h_i)]),    logits_i = head(shared_head.norm(h'_i)),

and `logits_i` predict `t_{i+2}`. Embedding and head are the main model's (the checkpoint's copies are redundant). The
block keeps its own layer of the cache, which has no holes only if the module sees every token once.

Source: DeepSeek-V3 report (arXiv:2412.19437), section 2.2, with the checkpoint's order of the two halves of eh_proj.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_ops.norm import add_rms_norm, rms_norm

from .attention import norm_weight
from .cache import Batch, PagedLatentCache
from .config import DeepseekConfig
from .linear import Gemm, Linear
from .transformer import Block, DeepseekModel

__all__ = ["MtpModule", "add_mtp", "draft"]


class MtpModule(nn.Module):
    """The weights of one module, layer `num_hidden_layers + i` of the checkpoint."""

    def __init__(self, config: DeepseekConfig, *, gemm: Gemm, dtype: torch.dtype, use_ue8m0: bool = False) -> None:
        super().__init__()
        d = config.hidden_size
        self.eps = config.rms_norm_eps
        self.enorm = norm_weight(d, dtype)
        self.hnorm = norm_weight(d, dtype)
        self.eh_proj = Linear(2 * d, (d,), dtype=dtype)
        self.block = Block(
            config, is_moe=config.n_routed_experts is not None, gemm=gemm, dtype=dtype, use_ue8m0=use_ue8m0
        )
        self.norm = norm_weight(d, dtype)

    def forward(
        self, embedded: Tensor, hidden: Tensor, batch: Batch, pages: Tensor, cos_sin: Tensor, *, absorbed: bool
    ) -> Tensor:
        """The hidden states after `shared_head.norm`, `[t, D]`."""
        parts = rms_norm(embedded, self.enorm, eps=self.eps), rms_norm(hidden, self.hnorm, eps=self.eps)
        x, residual = self.block(self.eh_proj(torch.cat(parts, dim=-1)), None, batch, pages, cos_sin, absorbed=absorbed)
        return add_rms_norm(x, residual, self.norm, eps=self.eps)[0]


def draft(
    model: DeepseekModel, hidden: Tensor, next_ids: Tensor, batch: Batch, cache: PagedLatentCache, *, module: int = 0
) -> tuple[Tensor, Tensor]:
    """One draft step: from each position's hidden state and the next token, logits of the token after it.

    Args:
        model: loaded with `mtp=True`.
        hidden: `[t, D]`, `model.hidden_states(...)` of the tokens in `batch`, or what an earlier draft returned.
        next_ids: `[t]` int64, the token that follows each of them.
        batch: where the tokens of `hidden` belong; the module's own latents go to the same slots of its own layer.
        cache: from `model.make_cache`.
        module: which MTP module.

    Returns:
        `logits`: `[t, vocab_size]` float32.
        `hidden`: `[t, D]`, from which the module can draft one token further.
    """
    pages = cache.pages[model.config.num_hidden_layers + module]
    hidden = model.mtp[module](
        model.embed(next_ids), hidden, batch, pages, model.rope_table(), absorbed=model.use_absorbed(batch)
    )
    return model.logits(hidden), hidden


def add_mtp(model: DeepseekModel) -> None:
    """Adds the modules that the config tells of, uninitialised like every weight."""
    for _ in range(model.config.num_nextn_predict_layers):
        model.mtp.append(MtpModule(model.config, gemm=model.gemm, dtype=model.dtype, use_ue8m0=model.use_ue8m0))
