"""SwiGLU's elementwise half, `silu(gate) * up`, plain or fused with the FP8 quantization of the next GEMM's input.

The input is the output of one fused GEMM: the gate's channels first, then the up-projection's.
Kernel: csrc/kernels/silu_mul.cuh.
Source: Shazeer, GLU Variants Improve Transformer (arXiv:2002.05202), equation 6.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from .checking import Checker
from .quantize import AMAX_FLOOR, HIGH_PRECISION, empty_quantized, per_token_cast_to_fp8_reference
from .registry import register_op

__all__ = ["silu_mul", "silu_mul_cast_to_fp8"]


def check_silu_mul(check: Checker, x: Tensor, *, min_dim: int) -> None:
    shape = check.tensor("x", x, dtype=HIGH_PRECISION, min_dim=min_dim)
    check.true(shape[-1] % 2 == 0, "x", "even in its last dimension (gate, then up)", shape[-1])
    check.row_stride("x", x, x.element_size())


def empty_output(x: Tensor) -> Tensor:
    """Uninitialised `[..., d]` for `x` of `[..., 2d]`."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


# -------------------------------------------------------------------------------------------------- silu_mul


def silu_mul(x: Tensor) -> Tensor:
    """`silu(gate) * up` with `silu(g) = g / (1 + exp(-g))`, where `gate, up = x[..., :d], x[..., d:]`.

    Computed in float32 and rounded once.

    Args:
        x: `[..., 2d]` bfloat16, float16 or float32, contiguous in the last dimension.

    Returns:
        `[..., d]`, of the dtype of `x`. Where the gate is -inf, or 0 times an infinity, it is NaN, there only.

    Raises:
        TypeError: `x` is not a tensor of one of these dtypes.
        ValueError: no dimension, or a last one that is odd or not contiguous.
    """
    return _silu_mul(x)


def _check_silu_mul(x: Tensor) -> None:
    check_silu_mul(Checker("silu_mul"), x, min_dim=1)


def silu_mul_reference(x: Tensor) -> Tensor:
    d = x.shape[-1] // 2
    gate, up = x[..., :d].float(), x[..., d:].float()
    return (silu(gate) * up).to(x.dtype).contiguous()


_silu_mul = register_op(
    "silu_mul(Tensor x) -> Tensor", check=_check_silu_mul, fake=empty_output, reference=silu_mul_reference
)


# -------------------------------------------------------------------------------------- silu_mul_cast_to_fp8


def silu_mul_cast_to_fp8(x: Tensor, *, use_ue8m0: bool = False, mn_major: bool = False) -> tuple[Tensor, Tensor]:
    """`per_token_cast_to_fp8(silu_mul(x))`, bit for bit: the product is rounded to the dtype of `x` in between.

    Args:
        x: `[..., m, 2d]` bfloat16, float16 or float32, contiguous in the last dimension; gate first, then up.
        use_ue8m0: round the scales up to powers of two.
        mn_major: return the scales MN-major and TMA-aligned instead of row-major.

    Returns:
        `q`: `[..., m, d]` float8_e4m3fn.
        `sf`: `[..., m, ceil(d / 128)]` float32, one dequantization scale per token per 128 channels.

    Raises:
        TypeError: `x` is not a tensor of one of these dtypes.
        ValueError: fewer than two dimensions, or a last one that is odd or not contiguous.
    """
    return _silu_mul_cast_to_fp8(x, use_ue8m0, mn_major)


def _check_silu_mul_cast(x: Tensor, use_ue8m0: bool, mn_major: bool) -> None:
    check_silu_mul(Checker("silu_mul_cast_to_fp8"), x, min_dim=2)


def silu_mul_cast_to_fp8_reference(x: Tensor, use_ue8m0: bool, mn_major: bool) -> tuple[Tensor, Tensor]:
    return per_token_cast_to_fp8_reference(silu_mul_reference(x), use_ue8m0, mn_major, AMAX_FLOOR)


_silu_mul_cast_to_fp8 = register_op(
    "silu_mul_cast_to_fp8(Tensor x, bool use_ue8m0, bool mn_major) -> (Tensor, Tensor)",
    check=_check_silu_mul_cast,
    fake=lambda x, use_ue8m0, mn_major: empty_quantized(empty_output(x), mn_major),
    reference=silu_mul_cast_to_fp8_reference,
)
