"""Rotary position embedding, and its table of cosines and sines with YaRN's longer context.

Kernel: csrc/kernels/rope.cuh.

Sources: Su et al., RoFormer (arXiv:2104.09864), section 3.4; Peng et al., YaRN (arXiv:2309.00071), section 3; the two
`mscale` factors are DeepSeek-V2's (arXiv:2405.04434, section 3.1.4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checking import Checker
from .quantize import HIGH_PRECISION
from .registry import register_op

__all__ = ["YarnScaling", "rope", "rope_cos_sin"]


# ------------------------------------------------------------------------------------------------------ rope


def rope(x: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool = True) -> Tensor:
    """Rotates each pair of channels of each token by the token's angles.

    With `c_i, s_i` the cosine and sine of pair `i` at the token's position, the pair `(a, b)` becomes
    `(a c_i - b s_i, a s_i + b c_i)`, in its place. Computed in float32 and rounded once.

    Args:
        x: `[t, ..., d]` bfloat16, float16 or float32, contiguous in the last dimension; d even.
        positions: `[t]` int32 or int64, contiguous. Positions outside the table are clamped into it: they rotate as
            its first or last row.
        cos_sin: `[max_position, d]` float32, contiguous in the last dimension; `d / 2` cosines, then `d / 2` sines.
        interleaved: pair `i` is `(x[2i], x[2i + 1])`, as DeepSeek's checkpoints have it; otherwise
            `(x[i], x[i + d / 2])`.

    Returns:
        The shape and dtype of `x`.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride or device is not as above, or the table is empty.
    """
    return _rope(x, positions, cos_sin, interleaved)


def _check_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    check = Checker("rope")
    t, *_, d = check.tensor("x", x, dtype=HIGH_PRECISION, min_dim=2)
    check.true(d > 0 and d % 2 == 0, "x", "even and not empty in its last dimension", d)
    check.tensor("positions", positions, (t,), (torch.int32, torch.int64))
    max_position, _ = check.tensor("cos_sin", cos_sin, ("max_position", d), torch.float32)
    check.true(max_position > 0, "cos_sin", "of one or more positions", max_position)
    check.row_stride("x", x, x.element_size())
    check.contiguous("positions", positions)
    check.row_stride("cos_sin", cos_sin, cos_sin.element_size())


def rope_reference(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    t, d = x.shape[0], x.shape[-1]
    angles = cos_sin.index_select(0, positions.clamp(0, cos_sin.shape[0] - 1))
    angles = angles.view(t, *[1] * (x.dim() - 2), d)
    cos, sin = angles[..., : d // 2], angles[..., d // 2 :]
    shape, pair_dim = ((d // 2, 2), -1) if interleaved else ((2, d // 2), -2)
    a, b = x.float().reshape(*x.shape[:-1], *shape).unbind(pair_dim)
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), pair_dim)
    return rotated.reshape(x.shape).to(x.dtype).contiguous()


_rope = register_op(
    "rope(Tensor x, Tensor positions, Tensor cos_sin, bool interleaved) -> Tensor",
    check=_check_rope,
    fake=lambda x, positions, cos_sin, interleaved: x.new_empty(x.shape),
    reference=rope_reference,
)


# ------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: the low frequencies slowed down by `factor`, the high ones kept, a linear ramp between them.

    Pair `i` of `d / 2` turns `original_max_position_embeddings * frequency / (2 pi)` times over the original context.
    The pairs that turn more than `beta_fast` times are kept, those that turn less than `beta_slow` times are slowed.

    Attributes:
        factor: by how much the context is longer than the original one; positive.
        original_max_position_embeddings: the context that the model was first trained with.
        beta_fast, beta_slow: number of turns at the ramp's ends.
        mscale, mscale_all_dim: weights of the attention temperature `m(s) = 0.1 s ln(factor) + 1`. The cosines and
            sines are multiplied by `m(mscale) / m(mscale_all_dim)`, the softmax scale by `m(mscale_all_dim)^2`.
            Absent, they count as 1 and 0: YaRN as published.

    Raises:
        ValueError: a value out of its range.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        check = Checker("YarnScaling")
        original = self.original_max_position_embeddings
        check.true(0 < self.factor < math.inf, "factor", "positive and finite", self.factor)
        check.true(original > 0, "original_max_position_embeddings", "positive", original)
        check.true(0 < self.beta_slow <= self.beta_fast, "beta_slow", "in (0, beta_fast]", self.beta_slow)

    def inverse_frequencies(self, dim: int, base: float) -> Tensor:
        """`[dim / 2]` float64 on the CPU: the angle per position of each pair."""
        frequencies = _frequencies(dim, base)
        low = max(math.floor(self._pair_of_turns(self.beta_fast, dim, base)), 0)
        high = min(math.ceil(self._pair_of_turns(self.beta_slow, dim, base)), dim - 1)
        # Where both ends fall on one pair the ramp is a step behind it.
        width = max(high - low, 1e-3)
        slowed = ((torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / width).clamp(0, 1)
        return frequencies * (1 - slowed) + frequencies / self.factor * slowed

    def _pair_of_turns(self, turns: float, dim: int, base: float) -> float:
        """The (fractional) pair that turns `turns` times over the original context."""
        return dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    def cos_sin_factor(self) -> float:
        """`m(mscale) / m(mscale_all_dim)`, the multiplier of cosines and sines: 1 in every DeepSeek release."""
        return self._m(1.0 if self.mscale is None else self.mscale) / self._m(self.mscale_all_dim or 0.0)

    def softmax_scale_factor(self) -> float:
        """`m(mscale_all_dim)^2`, by which attention multiplies its softmax scale; 1 where it is absent."""
        return self._m(self.mscale_all_dim or 0.0) ** 2

    def _m(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1 if self.factor > 1 else 1.0


def rope_cos_sin(
    max_position: int,
    dim: int,
    *,
    base: float = 10000.0,
    scaling: YarnScaling | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The table that `rope` takes: `cos(p f_i)` and `sin(p f_i)` of position `p` and pair `i`.

    `f_i = base^(-2i / dim)`, or what `scaling` makes of it. Computed in float64: in float32 the angles at position
    163839 would be off by up to 0.005.

    Args:
        max_position: number of positions, from 0.
        dim: rotated channels of a head, even.
        base: of the frequencies, above 1 (`rope_theta` in the checkpoints).
        scaling: YaRN's change of the frequencies, or None. It holds at all positions, short ones too.
        device: of the table.

    Returns:
        `[max_position, dim]` float32: `dim / 2` cosines, then `dim / 2` sines.

    Raises:
        ValueError: an argument is not as above.
    """
    check = Checker("rope_cos_sin")
    check.true(max_position >= 0, "max_position", "0 or more", max_position)
    check.true(dim > 0 and dim % 2 == 0, "dim", "positive and even", dim)
    check.true(1 < base < math.inf, "base", "above 1 and finite", base)
    frequencies = _frequencies(dim, base) if scaling is None else scaling.inverse_frequencies(dim, base)
    positions = torch.arange(max_position, dtype=torch.float64, device=device)
    angles = torch.outer(positions, frequencies.to(positions.device))
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return (table * (1.0 if scaling is None else scaling.cos_sin_factor())).float()


def _frequencies(dim: int, base: float) -> Tensor:
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
