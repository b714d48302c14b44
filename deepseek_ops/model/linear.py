"""Linear layers: `y = x W^T` with a weight in bfloat16 or float32, or in FP8 with 128 x 128 scales.

Projections of the same input are stacked into one weight, so that one GEMM reads the input once: a layer has *parts*,
and each part is one projection of the checkpoint. An FP8 layer starts each part at a multiple of 128 rows, the grid of
the scales; the rows between are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_ops.gemm import fp8_gemm_nt
from deepseek_ops.numeric import BLOCK, FP8, align, ceil_div
from deepseek_ops.quantize import per_block_cast_from_fp8, per_block_cast_to_fp8, per_token_cast_to_fp8

__all__ = ["Fp8Linear", "Gemm", "Linear", "make_linear", "padded"]

Gemm = Literal["bf16", "fp8"]
"""How a layer multiplies: in its own floating-point dtype (`bf16`, also for float32), or in FP8."""


class Linear(nn.Module):
    """`y = x W^T` in the weight's dtype.

    Args:
        in_features: `k`.
        out_features: rows of each part, in order; `n` is their sum.
        dtype: bfloat16 or float32.
        num_groups: makes the weight `[num_groups, n, k]`, one matrix per expert (see `moe.Experts`).
    """

    row_alignment = 1

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        num_groups: int | None = None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.in_features = in_features
        self.parts: list[slice] = []
        n = 0
        for rows in out_features:
            start = align(n, self.row_alignment)
            n = start + rows
            self.parts.append(slice(start, n))
        self.shape = (n, in_features) if num_groups is None else (num_groups, n, in_features)
        self.weight = nn.Parameter(torch.empty(self.shape, dtype=self.weight_dtype, device=device), requires_grad=False)

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.dtype

    def forward(self, x: Tensor) -> Tensor:
        """`[t, k]` to `[t, n]`, both in `dtype`."""
        return F.linear(x, self.weight)

    def split(self, y: Tensor) -> list[Tensor]:
        """The parts of an output, without the rows between them."""
        return [y[..., rows] for rows in self.parts]

    def dequantized(self) -> Tensor:
        """The weight in `dtype`, `[n, k]`."""
        return self.weight

    def _place(self, part: int, weight: Tensor) -> tuple[slice, slice]:
        start = self.parts[part].start
        return slice(start, start + weight.shape[0]), slice(0, weight.shape[1])

    def load_part(self, part: int, weight: Tensor, scale: Tensor | None = None, *, group: int | None = None) -> None:
        """Copies one projection of a checkpoint into its rows.

        Args:
            part: which of `out_features`.
            weight: `[rows, columns]`, at most the part's rows and `in_features` columns (the rest stays as it is).
            scale: for a weight in FP8 its `[ceil(rows / 128), ceil(columns / 128)]` float32 `weight_scale_inv`.
            group: which expert, for a layer with `num_groups`.
        """
        rows, columns = self._place(part, weight)
        weight = weight.to(self.weight.device)
        if scale is not None:
            weight = per_block_cast_from_fp8(weight, scale.to(weight.device), out_dtype=self.dtype)
        _of(self.weight, group)[rows, columns].copy_(weight)


class Fp8Linear(Linear):
    """`y = x W^T` in FP8: the input is quantized per token and 128 channels, the weight is stored quantized.

    Beside the e4m3 `weight` stands `weight_scale_inv`, `[ceil(n / 128), ceil(k / 128)]` float32, with the checkpoint's
    name; despite the name one multiplies by it. The output is in `dtype`, accumulated in float32.

    `use_ue8m0` rounds the scales of the input up to powers of two, as DeepSeek-V3.1 was trained.
    """

    row_alignment = BLOCK

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        num_groups: int | None = None,
        use_ue8m0: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, dtype=dtype, device=device, num_groups=num_groups)
        self.use_ue8m0 = use_ue8m0
        *lead, n, k = self.shape
        grid = (*lead, ceil_div(n, BLOCK), ceil_div(k, BLOCK))
        self.weight_scale_inv = nn.Parameter(torch.empty(grid, device=device), requires_grad=False)

    @property
    def weight_dtype(self) -> torch.dtype:
        return FP8

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input in FP8 and its scales, as the GEMM takes them."""
        return per_token_cast_to_fp8(x, use_ue8m0=self.use_ue8m0, mn_major=True)

    def forward(self, x: Tensor) -> Tensor:
        q, sf = self.quantize(x)
        return fp8_gemm_nt(q, sf, self.weight, self.weight_scale_inv, out_dtype=self.dtype)

    def dequantized(self) -> Tensor:
        return per_block_cast_from_fp8(self.weight, self.weight_scale_inv, out_dtype=self.dtype)

    def load_part(self, part: int, weight: Tensor, scale: Tensor | None = None, *, group: int | None = None) -> None:
        """As `Linear.load_part`; a weight without `scale` is quantized here."""
        rows, columns = self._place(part, weight)
        weight = weight.to(self.weight.device)
        if scale is None:
            weight, scale = per_block_cast_to_fp8(weight, use_ue8m0=self.use_ue8m0)
        first_block = rows.start // BLOCK
        blocks = slice(first_block, first_block + scale.shape[0])
        # Bytes, because torch copies e4m3 on every backend only as such.
        _of(self.weight, group).view(torch.uint8)[rows, columns].copy_(weight.view(torch.uint8))
        _of(self.weight_scale_inv, group)[blocks, : scale.shape[1]].copy_(scale)


def make_linear(
    in_features: int,
    out_features: Sequence[int],
    *,
    gemm: Gemm,
    dtype: torch.dtype,
    num_groups: int | None = None,
    use_ue8m0: bool = False,
) -> Linear:
    """A `Linear` or an `Fp8Linear`, as `gemm` says."""
    if gemm == "fp8":
        return Fp8Linear(in_features, out_features, dtype=dtype, num_groups=num_groups, use_ue8m0=use_ue8m0)
    return Linear(in_features, out_features, dtype=dtype, num_groups=num_groups)


def padded(width: int, gemm: Gemm) -> int:
    """An inner width that a stacked pair of parts shares with the layer after it.

    FP8 rounds it up to whole blocks, so that gate and up keep their scales apart (the dense layer of V2-Lite is 10944
    wide, 85.5 blocks). The padding is zero in both layers and adds exact zeros.
    """
    return align(width, BLOCK) if gemm == "fp8" else width


def _of(x: Tensor, group: int | None) -> Tensor:
    return x if group is None else x[group]
