"""The feed-forward layers: a gated MLP, and the mixture of experts (DeepSeekMoE).

`y = shared(x) + sum_k w_k expert_k(x)`: the gate scores every expert in float32 and keeps a few per token; the shared
experts see every token and are one MLP of `n_shared_experts` times an expert's width.

Source: DeepSeek-V2 report (arXiv:2405.04434), section 2.2; V3 report (arXiv:2412.19437), section 2.1.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_ops.moe import moe_gate, moe_mapping, moe_permute, moe_unpermute

from .config import DeepseekConfig
from .linear import Gemm, Input, Linear, linear_float32, make_linear, padded

__all__ = ["Experts", "Gate", "Mlp", "MoE"]


class Mlp(nn.Module):
    """`down(silu(gate x) * up x)`; `gate_up_proj` stacks gate and up."""

    def __init__(
        self, hidden_size: int, width: int, *, gemm: Gemm, dtype: torch.dtype, use_ue8m0: bool = False
    ) -> None:
        super().__init__()
        width = padded(width, gemm)
        self.gate_up_proj = make_linear(hidden_size, (width, width), gemm=gemm, dtype=dtype, use_ue8m0=use_ue8m0)
        self.down_proj = make_linear(width, (hidden_size,), gemm=gemm, dtype=dtype, use_ue8m0=use_ue8m0)

    def forward(self, x: Input) -> Tensor:
        """`[t, D]` to `[t, D]`."""
        return self.down_proj(self.down_proj.prepare_silu_mul(self.gate_up_proj(x)))


class Gate(nn.Module):
    """Chooses each token's experts and weights them; logits, scores and bias are float32 in every model.

    A bfloat16 model keeps the weight in bfloat16, as every release stores it. That rounds nothing: the products with
    the tokens, which are bfloat16 too, are exact in float32 (see `linear_float32`). For a checkpoint that stores it
    otherwise, `load_model` calls `keep_float32`.
    """

    def __init__(self, config: DeepseekConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        num_experts = config.n_routed_experts
        assert num_experts is not None
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size, dtype=dtype), requires_grad=False)
        self.e_score_correction_bias = (
            nn.Parameter(torch.empty(num_experts), requires_grad=False) if config.topk_method == "noaux_tc" else None
        )

    def keep_float32(self) -> None:
        """Makes the weight, which is not filled yet, one of float32."""
        self.weight = nn.Parameter(torch.empty_like(self.weight, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[t, D]` to weights and indices of the chosen experts, both `[t, num_experts_per_tok]`."""
        is_grouped = self.config.topk_method != "greedy"
        return moe_gate(
            linear_float32(x, self.weight),
            self.e_score_correction_bias,
            num_topk=self.config.num_experts_per_tok,
            num_groups=self.config.n_group if is_grouped else 1,
            num_topk_groups=self.config.topk_group if is_grouped else 1,
            scoring_func=self.config.scoring_func,
            norm_topk_prob=self.config.norm_topk_prob,
            routed_scaling_factor=self.config.routed_scaling_factor,
        )


class Experts(nn.Module):
    """The routed experts, each an `Mlp`, stacked: `gate_up_proj` `[E, 2 I, D]` and `down_proj` `[E, D, I]`.

    Tokens are sorted by expert, so that each GEMM is one grouped GEMM whose group sizes stay on the device.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        width: int,
        *,
        gemm: Gemm,
        dtype: torch.dtype,
        use_ue8m0: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        width = padded(width, gemm)

        def linear(in_features: int, *out_features: int) -> Linear:
            return make_linear(
                in_features, out_features, gemm=gemm, dtype=dtype, num_groups=num_experts, use_ue8m0=use_ue8m0
            )

        self.gate_up_proj = linear(hidden_size, width, width)
        self.down_proj = linear(width, hidden_size)

    def forward(self, x: Input, topk_weights: Tensor, topk_idx: Tensor) -> Tensor:
        """The weighted sum of each token's experts, `[t, D]`."""
        token_idx, row_idx, offsets, _ = moe_mapping(topk_idx, self.num_experts)
        rows = permute(x, token_idx)
        gate_up = self.gate_up_proj.grouped(rows, offsets)
        y = self.down_proj.grouped(self.down_proj.prepare_silu_mul(gate_up), offsets)
        return moe_unpermute(y, row_idx, topk_weights)


class MoE(nn.Module):
    """Gate, routed experts and shared experts."""

    def __init__(self, config: DeepseekConfig, *, gemm: Gemm, dtype: torch.dtype, use_ue8m0: bool = False) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        width = config.moe_intermediate_size
        self.gate = Gate(config, dtype=dtype)
        self.experts = Experts(
            config.n_routed_experts, config.hidden_size, width, gemm=gemm, dtype=dtype, use_ue8m0=use_ue8m0
        )
        self.shared_experts = (
            Mlp(config.hidden_size, config.n_shared_experts * width, gemm=gemm, dtype=dtype, use_ue8m0=use_ue8m0)
            if config.n_shared_experts
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[t, D]` to `[t, D]`."""
        topk_weights, topk_idx = self.gate(x)
        prepared = self.experts.gate_up_proj.prepare(x)  # quantized once for all experts
        routed = self.experts(prepared, topk_weights, topk_idx)
        return routed if self.shared_experts is None else routed + self.shared_experts(prepared)


def permute(x: Input, token_idx: Tensor) -> Input:
    """`moe_permute` of values, or of quantized values and their scales."""
    if isinstance(x, Tensor):
        return moe_permute(x, token_idx)
    q, sf = x
    return moe_permute(q, token_idx), moe_permute(sf, token_idx)
