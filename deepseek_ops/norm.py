"""RMSNorm, plain or fused with what stands around it: the residual addition before, the FP8 quantization after.

Every fused op gives the bits of the ops that it replaces: the sum and the norm are rounded to the dtype of `x` where
the separate ops would have rounded them.
Kernel: csrc/kernels/rms_norm.cuh.
Method: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv:1910.07467), equation 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checking import Checker
from .quantize import AMAX_FLOOR, HIGH_PRECISION, empty_quantized, per_token_cast_to_fp8_reference
from .registry import register_op

__all__ = ["add_rms_norm", "add_rms_norm_cast_to_fp8", "rms_norm", "rms_norm_cast_to_fp8"]


def check_norm(check: Checker, x: Tensor, weight: Tensor, eps: float, *, min_dim: int) -> tuple[int, ...]:
    """What all four ops ask of the norm's operands; returns the shape of `x`."""
    shape = check.tensor("x", x, dtype=HIGH_PRECISION, min_dim=min_dim)
    weight_dtypes = (x.dtype,) if x.dtype == torch.float32 else (x.dtype, torch.float32)
    check.tensor("weight", weight, shape[-1:], weight_dtypes)
    check.row_stride("x", x, x.element_size())
    check.row_stride("weight", weight, weight.element_size())
    check.true(0 < eps < math.inf, "eps", "positive and finite", eps)
    return shape


def check_add_norm(check: Checker, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, min_dim: int) -> None:
    shape = check_norm(check, x, weight, eps, min_dim=min_dim)
    check.tensor("residual", residual, shape, x.dtype)
    check.row_stride("residual", residual, residual.element_size())


# -------------------------------------------------------------------------------------------------- rms_norm


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """`y = x / sqrt(mean(x^2) + eps) * weight`, over the last dimension.

    Everything is computed in float32, as `(x * rsqrt(mean(x^2) + eps)) * weight`, and rounded once at the end.

    Args:
        x: `[..., d]` bfloat16, float16 or float32, contiguous in the last dimension.
        weight: `[d]`, of the dtype of `x` or float32; which of the two changes nothing but the weight's own precision.
        eps: added to the mean of the squares, positive.

    Returns:
        The shape and dtype of `x`. A NaN or an infinity touches its own row only. Squares beyond float32 (magnitudes
        above 1.8e19) overflow and turn the finite part of their row into zeros.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, device or `eps` is not as above.
    """
    return _rms_norm(x, weight, eps)


def _check_rms_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    check_norm(Checker("rms_norm"), x, weight, eps, min_dim=1)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    high = x.float()
    normed = high * torch.rsqrt(high.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype).contiguous()


_rms_norm = register_op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    check=_check_rms_norm,
    fake=lambda x, weight, eps: x.new_empty(x.shape),
    reference=rms_norm_reference,
)


# ---------------------------------------------------------------------------------------------- add_rms_norm


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`residual_out = x + residual`, `y = rms_norm(residual_out, weight)`.

    The sum is rounded to the dtype of `x` before it is normed, so that both outputs have the bits of the two steps
    taken apart.

    Args:
        x: `[..., d]` bfloat16, float16 or float32, contiguous in the last dimension: a block's output.
        residual: the shape and dtype of `x`, contiguous in the last dimension: the residual stream.
        weight: `[d]`, of the dtype of `x` or float32.
        eps: added to the mean of the squares, positive.

    Returns:
        `y`: the shape and dtype of `x`, the next block's input.
        `residual_out`: the same, the residual stream from here on.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, device or `eps` is not as above.
    """
    return _add_rms_norm(x, residual, weight, eps)


def _check_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    check_add_norm(Checker("add_rms_norm"), x, residual, weight, eps, min_dim=1)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual_out = (x.float() + residual.float()).to(x.dtype).contiguous()
    return rms_norm_reference(residual_out, weight, eps), residual_out


_add_rms_norm = register_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    check=_check_add_rms_norm,
    fake=lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
    reference=add_rms_norm_reference,
)


# -------------------------------------------------------------------------------------- rms_norm_cast_to_fp8


def rms_norm_cast_to_fp8(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, use_ue8m0: bool = False, mn_major: bool = False
) -> tuple[Tensor, Tensor]:
    """`per_token_cast_to_fp8(rms_norm(x, weight))`, bit for bit: the norm is rounded to the dtype of `x` in between.

    Args:
        x: `[..., m, d]` bfloat16, float16 or float32, contiguous in the last dimension.
        weight: `[d]`, of the dtype of `x` or float32.
        eps: added to the mean of the squares, positive.
        use_ue8m0: round the scales up to powers of two.
        mn_major: return the scales MN-major and TMA-aligned instead of row-major.

    Returns:
        `q`: `[..., m, d]` float8_e4m3fn.
        `sf`: `[..., m, ceil(d / 128)]` float32, one dequantization scale per token per 128 channels.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, device or `eps` is not as above.
    """
    return _rms_norm_cast_to_fp8(x, weight, eps, use_ue8m0, mn_major)


def _check_rms_norm_cast(x: Tensor, weight: Tensor, eps: float, use_ue8m0: bool, mn_major: bool) -> None:
    check_norm(Checker("rms_norm_cast_to_fp8"), x, weight, eps, min_dim=2)


def rms_norm_cast_to_fp8_reference(
    x: Tensor, weight: Tensor, eps: float, use_ue8m0: bool, mn_major: bool
) -> tuple[Tensor, Tensor]:
    return per_token_cast_to_fp8_reference(rms_norm_reference(x, weight, eps), use_ue8m0, mn_major, AMAX_FLOOR)


_rms_norm_cast_to_fp8 = register_op(
    "rms_norm_cast_to_fp8(Tensor x, Tensor weight, float eps, bool use_ue8m0, bool mn_major) -> (Tensor, Tensor)",
    check=_check_rms_norm_cast,
    fake=lambda x, weight, eps, use_ue8m0, mn_major: empty_quantized(x, mn_major),
    reference=rms_norm_cast_to_fp8_reference,
)


# ---------------------------------------------------------------------------------- add_rms_norm_cast_to_fp8


def add_rms_norm_cast_to_fp8(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    use_ue8m0: bool = False,
    mn_major: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y, residual_out = add_rms_norm(x, residual, weight)`, and `y` as `per_token_cast_to_fp8` gives it, bit for bit.

    Args:
        x: `[..., m, d]` bfloat16, float16 or float32, contiguous in the last dimension: a block's output.
        residual: the shape and dtype of `x`, contiguous in the last dimension: the residual stream.
        weight: `[d]`, of the dtype of `x` or float32.
        eps: added to the mean of the squares, positive.
        use_ue8m0: round the scales up to powers of two.
        mn_major: return the scales MN-major and TMA-aligned instead of row-major.

    Returns:
        `q`: `[..., m, d]` float8_e4m3fn.
        `sf`: `[..., m, ceil(d / 128)]` float32, one dequantization scale per token per 128 channels.
        `residual_out`: the shape and dtype of `x`, the residual stream from here on.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, device or `eps` is not as above.
    """
    return _add_rms_norm_cast_to_fp8(x, residual, weight, eps, use_ue8m0, mn_major)


def _check_add_rms_norm_cast(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, use_ue8m0: bool, mn_major: bool
) -> None:
    check_add_norm(Checker("add_rms_norm_cast_to_fp8"), x, residual, weight, eps, min_dim=2)


def _fake_add_rms_norm_cast(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, use_ue8m0: bool, mn_major: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return *empty_quantized(x, mn_major), x.new_empty(x.shape)


def add_rms_norm_cast_to_fp8_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, use_ue8m0: bool, mn_major: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, residual_out = add_rms_norm_reference(x, residual, weight, eps)
    return *per_token_cast_to_fp8_reference(y, use_ue8m0, mn_major, AMAX_FLOOR), residual_out


_add_rms_norm_cast_to_fp8 = register_op(
    "add_rms_norm_cast_to_fp8(Tensor x, Tensor residual, Tensor weight, float eps, bool use_ue8m0, bool mn_major)"
    " -> (Tensor, Tensor, Tensor)",
    check=_check_add_rms_norm_cast,
    fake=_fake_add_rms_norm_cast,
    reference=add_rms_norm_cast_to_fp8_reference,
)
