"""Linear layers: `y = x W^T` with a weight in bfloat16 or float32, or in FP8 with 128 x 128 scales.

Only this file knows which of the two a layer is: what comes before a projection (a norm, SwiGLU) is asked of the layer
that it feeds, which answers with the values, or with them quantized in the same pass.

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

from deepseek_ops.activation import silu_mul, silu_mul_cast_to_fp8
from deepseek_ops.gemm import fp8_gemm_nt
from deepseek_ops.grouped_bf16_gemm import m_grouped_bf16_gemm_nt_offsets
from deepseek_ops.grouped_gemm import m_grouped_fp8_gemm_nt_offsets
from deepseek_ops.norm import add_rms_norm, add_rms_norm_cast_to_fp8, rms_norm, rms_norm_cast_to_fp8
from deepseek_ops.numeric import BLOCK, FP8, align, ceil_div
from deepseek_ops.quantize import per_block_cast_from_fp8, per_block_cast_to_fp8, per_token_cast_to_fp8
from deepseek_ops.registry import OPS

__all__ = ["Fp8Linear", "Gemm", "Input", "Linear", "linear_float32", "make_linear", "padded"]

Gemm = Literal["bf16", "fp8"]
"""How a layer multiplies: in its own floating-point dtype (`bf16`, also for float32), or in FP8."""

Input = Tensor | tuple[Tensor, Tensor]
"""What a layer takes: values, or for an FP8 layer also values in FP8 with their scales."""


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

    def forward(self, x: Input) -> Tensor:
        """`[t, k]` to `[t, n]`, both in `dtype`."""
        assert isinstance(x, Tensor)
        return F.linear(x, self.weight)

    def grouped(self, x: Input, offsets: Tensor) -> Tensor:
        """`[rows, k]` to `[rows, n]`, rows `offsets[g] <= r < offsets[g + 1]` by the matrix of group `g`.

        On CUDA the offsets are read on the device for bfloat16; for float32, and on the CPU, torch's `grouped_mm` loops
        over the groups on the host.
        """
        assert isinstance(x, Tensor)
        return grouped_linear(x, self.weight, offsets)

    def prepare(self, x: Tensor) -> Input:
        """The layer's input from plain values: for several layers that take the same."""
        return x

    def prepare_norm(self, x: Tensor, weight: Tensor, eps: float) -> Input:
        """The layer's input from `rms_norm`."""
        return rms_norm(x, weight, eps=eps)

    def prepare_add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Input, Tensor]:
        """The layer's input from `add_rms_norm`, and the new residual stream."""
        return add_rms_norm(x, residual, weight, eps=eps)

    def prepare_silu_mul(self, gate_up: Tensor) -> Input:
        """The layer's input from `silu_mul`."""
        return silu_mul(gate_up)

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

    def forward(self, x: Input) -> Tensor:
        q, sf = x if isinstance(x, tuple) else self.prepare(x)
        return fp8_gemm_nt(q, sf, self.weight, self.weight_scale_inv, out_dtype=self.dtype, b_is_constant=True)

    def grouped(self, x: Input, offsets: Tensor) -> Tensor:
        """As `Linear.grouped`, without reading the offsets on the host on any device."""
        q, sf = x if isinstance(x, tuple) else self.prepare(x)
        return m_grouped_fp8_gemm_nt_offsets(q, sf, self.weight, self.weight_scale_inv, offsets, out_dtype=self.dtype)

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return per_token_cast_to_fp8(x, use_ue8m0=self.use_ue8m0, mn_major=True)

    def prepare_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return rms_norm_cast_to_fp8(x, weight, eps=eps, use_ue8m0=self.use_ue8m0, mn_major=True)

    def prepare_add_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        q, sf, residual = add_rms_norm_cast_to_fp8(
            x, residual, weight, eps=eps, use_ue8m0=self.use_ue8m0, mn_major=True
        )
        return (q, sf), residual

    def prepare_silu_mul(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        return silu_mul_cast_to_fp8(gate_up, use_ue8m0=self.use_ue8m0, mn_major=True)

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


FEW_ROWS = 64
"""Rows of an expert, on average, up to which reading the weights is most of the work."""


def has_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether `m_grouped_bf16_gemm_nt_offsets` is made for such operands: from their shapes, which the host knows."""
    num_experts, n, k = weight.shape
    return x.dtype == torch.bfloat16 and n % 8 == k % 8 == 0 and x.shape[0] <= FEW_ROWS * num_experts


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`y[r] = x[r] weight[e]^T` for rows `offsets[e] <= r < offsets[e + 1]`.

    Of few bfloat16 rows by a kernel that is made for reading the weights, where the GPU has it; else by torch's
    `grouped_mm`.

    Args:
        x: `[rows, k]`.
        weight: `[num_experts, n, k]`, the dtype of `x`.
        offsets: `[num_experts + 1]` int32.

    Returns:
        `[rows, n]`.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[1])
    if has_few_rows(x, weight) and OPS["m_grouped_bf16_gemm_nt_offsets"].runs_kernel_on(x.device):
        return m_grouped_bf16_gemm_nt_offsets(x, weight, offsets)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:])


def linear_float32(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` of logits, with operands as they are, accumulated and returned in float32.

    Rounding logits to bfloat16 would merge neighbours: its step is 0.125 between 16 and 32. Operands in bfloat16 lose
    nothing: a product of two has at most 16 significant bits and is exact in float32, so multiplying them as they are,
    on tensor cores, differs from float32 arithmetic on the widened ones only in how the sum is ordered and rounded.
    """
    if x.is_cuda and x.dtype == weight.dtype != torch.float32:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())


def _of(x: Tensor, group: int | None) -> Tensor:
    return x if group is None else x[group]
