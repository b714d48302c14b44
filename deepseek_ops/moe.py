"""Mixture of experts around the grouped GEMM: choose experts, order the rows by expert, gather them, reduce them back.

    topk_weights, topk_idx = moe_gate(logits, bias, ...)
    token_idx, row_idx, offsets, m_indices = moe_mapping(topk_idx, num_experts)
    y = experts(moe_permute(x, token_idx))              # any grouped GEMM, by `offsets` or by `m_indices`
    out = moe_unpermute(y, row_idx, topk_weights)

Kernels: csrc/kernels/moe_gate.cuh, moe_mapping.cuh, moe_permute.cuh and moe_unpermute.cuh.

No step reads a value on the host: the shapes depend on shapes alone, so that a step can be captured into a CUDA graph.
Sources: DeepSeek-V2 (arXiv:2405.04434), section 2.2; DeepSeek-V3 (arXiv:2412.19437), section 2.1.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checking import Checker
from .quantize import HIGH_PRECISION
from .registry import register_op

__all__ = ["moe_gate", "moe_mapping", "moe_permute", "moe_unpermute"]

SCORING_FUNCS = ("sigmoid", "softmax")


# -------------------------------------------------------------------------------------------------- moe_gate


def moe_gate(
    logits: Tensor,
    bias: Tensor | None,
    *,
    num_topk: int,
    num_groups: int = 1,
    num_topk_groups: int = 1,
    scoring_func: str = "sigmoid",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Chooses each token's experts among those of its best groups, and their weights.

    `score = scoring_func(logits)` and `choice = score + bias`. The experts form `num_groups` groups of consecutive
    ones, of which the best `num_topk_groups` are kept: a group's score is the sum of its two best choices with
    "sigmoid" (DeepSeek-V3's noaux_tc; the only one where the group has a single expert), its best choice with
    "softmax" (DeepSeek-V2's greedy and group_limited_greedy). Of the kept groups the `num_topk` best choices win.
    Their weights are their scores without the bias, divided by their sum + 1e-20 with `norm_topk_prob`, times
    `routed_scaling_factor`. Equal choices, and equal groups, go to the lowest index.

    Args:
        logits: `[t, num_experts]` float32, contiguous in the last dimension.
        bias: `[num_experts]` float32, contiguous, or None: it changes who is chosen and no weight
            (`e_score_correction_bias` in the checkpoints; V2 has none).
        num_topk: experts per token.
        num_groups: a divisor of the number of experts.
        num_topk_groups: groups per token.
        scoring_func: "sigmoid", or "softmax" over all experts.
        norm_topk_prob: whether a token's weights are made to sum to one before they are scaled.
        routed_scaling_factor: multiplies the weights.

    Returns:
        `topk_weights`: `[t, num_topk]` float32, best choice first.
        `topk_idx`: `[t, num_topk]` int32, distinct experts of a token, always valid. NaN counts as the best choice
        and reaches its own token only; a choice of -inf is worth no more than one outside the kept groups.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride or device is not as above, the groups do not divide the experts, the kept groups
            have fewer than `num_topk` experts, or the scoring function is unknown.
    """
    return _moe_gate(
        logits, bias, num_topk, num_groups, num_topk_groups, scoring_func, norm_topk_prob, routed_scaling_factor
    )


def _check_moe_gate(
    logits: Tensor,
    bias: Tensor | None,
    num_topk: int,
    num_groups: int,
    num_topk_groups: int,
    scoring_func: str,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> None:
    check = Checker("moe_gate")
    _, num_experts = check.tensor("logits", logits, ("t", "num_experts"), torch.float32)
    check.row_stride("logits", logits, logits.element_size())
    if bias is not None:
        check.tensor("bias", bias, (num_experts,), torch.float32)
        check.contiguous("bias", bias)
    divides = num_groups > 0 and num_experts % num_groups == 0
    check.true(divides, "num_groups", f"a divisor of {num_experts} experts", num_groups)
    check.true(1 <= num_topk_groups <= num_groups, "num_topk_groups", f"in 1..{num_groups}", num_topk_groups)
    kept = num_experts // num_groups * num_topk_groups
    check.true(1 <= num_topk <= kept, "num_topk", f"in 1..{kept}, the experts of the kept groups", num_topk)
    check.true(scoring_func in SCORING_FUNCS, "scoring_func", " or ".join(map(repr, SCORING_FUNCS)), repr(scoring_func))


def moe_gate_reference(
    logits: Tensor,
    bias: Tensor | None,
    num_topk: int,
    num_groups: int,
    num_topk_groups: int,
    scoring_func: str,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias

    group_size = logits.shape[1] // num_groups
    groups = choice.reshape(-1, num_groups, group_size)
    num_best = min(2, group_size) if scoring_func == "sigmoid" else 1
    kept_groups = _best_first(groups.topk(num_best).values.sum(-1), num_topk_groups)
    kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, kept_groups, True)
    choice = groups.masked_fill(~kept.unsqueeze(-1), -math.inf).flatten(1)

    topk_idx = _best_first(choice, num_topk)
    weights = scores.gather(1, topk_idx)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routed_scaling_factor, topk_idx.int()


def _best_first(x: Tensor, k: int) -> Tensor:
    """The indices of each row's `k` largest values. Unlike `Tensor.topk` it has a rule for equal ones."""
    return x.sort(dim=-1, descending=True, stable=True).indices[:, :k]


_moe_gate = register_op(
    "moe_gate(Tensor logits, Tensor? bias, int num_topk, int num_groups, int num_topk_groups, "
    "str scoring_func, bool norm_topk_prob, float routed_scaling_factor) -> (Tensor, Tensor)",
    check=_check_moe_gate,
    fake=lambda logits, bias, num_topk, *rest: (
        logits.new_empty((logits.shape[0], num_topk)),
        logits.new_empty((logits.shape[0], num_topk), dtype=torch.int32),
    ),
    reference=moe_gate_reference,
)


# ----------------------------------------------------------------------------------------------- moe_mapping


def moe_mapping(topk_idx: Tensor, num_experts: int, *, alignment: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Orders all (token, choice) pairs by expert: the rows of the grouped GEMM's input.

    Expert `e` owns the rows from `offsets[e]` to `offsets[e + 1]`, its pairs first, in the order of (token, choice),
    then padding up to a multiple of `alignment`. An expert without pairs owns no row. With `alignment` 1 there is no
    padding, and `offsets[e + 1] - offsets[e]` is the expert's number of pairs.

    The number of rows is static, the most that `n = t * num_topk` pairs can need: with `j = min(num_experts, n)`
    experts at work it is `alignment * (j + (n - j) // alignment)`, reached where all but one of them have a pair
    more than a multiple of `alignment`; `n` for `alignment` 1. Rows from `offsets[num_experts]` on are padding.

    Args:
        topk_idx: `[t, num_topk]` int32, contiguous. Values outside `[0, num_experts)` are other ranks' experts and
            get no row.
        num_experts: number of (local) experts, at least 1.
        alignment: each expert's rows start at a multiple of it.

    Returns:
        `token_idx`: `[rows]` int32, the token that a row comes from, -1 for padding.
        `row_idx`: `[t, num_topk]` int32, the row of each pair, -1 for those that have none.
        `offsets`: `[num_experts + 1]` int32, the first row of each expert, and the end of the last.
        `m_indices`: `[rows]` int32, the expert of a row, -1 for padding (also within an expert's rows).

    Raises:
        TypeError: `topk_idx` is not an int32 tensor.
        ValueError: a shape or stride is not as above, a number is below 1, or the rows do not fit int32.
    """
    return _moe_mapping(topk_idx, num_experts, alignment)


def num_mapped_rows(topk_idx: Tensor, num_experts: int, alignment: int) -> int:
    """The number of rows of a mapping: see `moe_mapping`."""
    n = topk_idx.numel()
    j = min(num_experts, n)
    return alignment * (j + (n - j) // alignment)


def _check_moe_mapping(topk_idx: Tensor, num_experts: int, alignment: int) -> None:
    check = Checker("moe_mapping")
    check.tensor("topk_idx", topk_idx, ("t", "num_topk"), torch.int32)
    check.contiguous("topk_idx", topk_idx)
    check.true(num_experts >= 1, "num_experts", "1 or more", num_experts)
    check.true(alignment >= 1, "alignment", "1 or more", alignment)
    rows = num_mapped_rows(topk_idx, num_experts, alignment)
    check.true(rows < 2**31, "topk_idx", "small enough for its rows to fit int32", f"{rows} rows")


def _fake_moe_mapping(topk_idx: Tensor, num_experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = num_mapped_rows(topk_idx, num_experts, alignment)
    new = topk_idx.new_empty
    return new(rows), new(topk_idx.shape), new(num_experts + 1), new(rows)


def moe_mapping_reference(topk_idx: Tensor, num_experts: int, alignment: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    expert = topk_idx.flatten().long()
    expert = torch.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    expert, pair = expert.sort(stable=True)  # the pairs without a row come last, as expert `num_experts`
    device = expert.device

    first = torch.searchsorted(expert, torch.arange(num_experts + 1, device=device))  # of each expert, among the pairs
    counts = first.diff()
    padded = (counts + alignment - 1) // alignment * alignment
    offsets = pad(padded.cumsum(0), (1, 0))

    row = torch.arange(expert.numel(), device=device) - first[expert] + offsets[expert]
    row = torch.where(expert < num_experts, row, -1)
    row_idx = torch.empty_like(row).scatter_(0, pair, row).view(topk_idx.shape)

    row = torch.arange(num_mapped_rows(topk_idx, num_experts, alignment), device=device)
    owner = torch.searchsorted(offsets, row, right=True) - 1  # `num_experts` from the end of the last expert on
    nth = row - offsets[owner]
    live = nth < pad(counts, (0, 1))[owner]
    token_idx = torch.where(live, pair[torch.where(live, first[owner] + nth, 0)] // max(topk_idx.shape[1], 1), -1)
    m_indices = torch.where(live, owner, -1)
    return token_idx.int(), row_idx.int(), offsets.int(), m_indices.int()


_moe_mapping = register_op(
    "moe_mapping(Tensor topk_idx, int num_experts, int alignment) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_moe_mapping,
    fake=_fake_moe_mapping,
    reference=moe_mapping_reference,
)


# ----------------------------------------------------------------------------------------------- moe_permute


def moe_permute(x: Tensor, token_idx: Tensor) -> Tensor:
    """`out[r] = x[token_idx[r]]`, and zeros where `token_idx[r]` is no token.

    Args:
        x: `[t, d]` of any dtype, in any layout: activations, or their FP8 values and, by a second call, their scales.
        token_idx: `[rows]` int32, contiguous, from `moe_mapping`. Values outside `[0, t)` are padding.

    Returns:
        `[rows, d]` of the dtype of `x`, contiguous; padding has all bits zero.

    Raises:
        TypeError: `x` is not a tensor, or `token_idx` not an int32 one.
        ValueError: a shape, stride or device is not as above.
    """
    return _moe_permute(x, token_idx)


def _check_moe_permute(x: Tensor, token_idx: Tensor) -> None:
    check = Checker("moe_permute")
    check.tensor("x", x, ("t", "d"))
    check.tensor("token_idx", token_idx, ("rows",), torch.int32)
    check.contiguous("token_idx", token_idx)


def moe_permute_reference(x: Tensor, token_idx: Tensor) -> Tensor:
    t, d = x.shape
    if t == 0:
        return x.new_zeros((token_idx.shape[0], d))
    values = x.view(torch.uint8) if x.element_size() == 1 else x  # not all ops know all 8-bit floats
    live = (token_idx >= 0) & (token_idx < t)
    rows = values.index_select(0, torch.where(live, token_idx, 0))
    return rows.masked_fill(~live.unsqueeze(1), 0).view(x.dtype)


_moe_permute = register_op(
    "moe_permute(Tensor x, Tensor token_idx) -> Tensor",
    check=_check_moe_permute,
    fake=lambda x, token_idx: x.new_empty((token_idx.shape[0], x.shape[1])),
    reference=moe_permute_reference,
)


# --------------------------------------------------------------------------------------------- moe_unpermute


def moe_unpermute(y: Tensor, row_idx: Tensor, topk_weights: Tensor) -> Tensor:
    """`out[i] = sum_j topk_weights[i, j] * y[row_idx[i, j]]`, added in float32 in the order of `j` and rounded once.

    Args:
        y: `[rows, d]` bfloat16, float16 or float32, contiguous in the last dimension: the experts' outputs.
        row_idx: `[t, num_topk]` int32, contiguous, from `moe_mapping`. A pair whose row is outside `[0, rows)` adds
            nothing, whatever its weight.
        topk_weights: `[t, num_topk]` float32, contiguous.

    Returns:
        `[t, d]`, of the dtype of `y`; zeros for a token none of whose pairs has a row. Rows of `y` that no pair names
        are not looked at.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride or device is not as above.
    """
    return _moe_unpermute(y, row_idx, topk_weights)


def _check_moe_unpermute(y: Tensor, row_idx: Tensor, topk_weights: Tensor) -> None:
    check = Checker("moe_unpermute")
    check.tensor("y", y, ("rows", "d"), HIGH_PRECISION)
    shape = check.tensor("row_idx", row_idx, ("t", "num_topk"), torch.int32)
    check.tensor("topk_weights", topk_weights, shape, torch.float32)
    check.row_stride("y", y, y.element_size())
    check.contiguous("row_idx", row_idx)
    check.contiguous("topk_weights", topk_weights)


def moe_unpermute_reference(y: Tensor, row_idx: Tensor, topk_weights: Tensor) -> Tensor:
    rows, d = y.shape
    t, num_topk = row_idx.shape
    out = y.new_zeros((t, d), dtype=torch.float32)
    if rows == 0:
        return out.to(y.dtype)
    for j in range(num_topk):
        row = row_idx[:, j]
        live = (row >= 0) & (row < rows)
        term = topk_weights[:, j, None] * y.index_select(0, torch.where(live, row, 0)).float()
        out = torch.where(live.unsqueeze(1), out + term, out)
    return out.to(y.dtype)


_moe_unpermute = register_op(
    "moe_unpermute(Tensor y, Tensor row_idx, Tensor topk_weights) -> Tensor",
    check=_check_moe_unpermute,
    fake=lambda y, row_idx, topk_weights: y.new_empty((row_idx.shape[0], y.shape[1])),
    reference=moe_unpermute_reference,
)
