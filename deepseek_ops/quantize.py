"""FP8 quantization with fine-grained scales: 1 x 128 per token for activations, 128 x 128 blocks for weights.

Kernel: csrc/kernels/fp8_quantize.cuh.  Method: DeepSeek-V3 report (arXiv:2412.19437), section 3.3.

A scaling factor `sf` is what one multiplies by to dequantize. It comes as float32, either any value (`amax / 448`)
or, with `use_ue8m0`, rounded up to a power of two (the UE8M0 format's values, still stored as float32).

Two layouts hold the factors of `[m, k]` activations, both of shape `[m, ceil(k / 128)]`: row-major, and MN-major
TMA-aligned, where the token dimension is contiguous and each column starts at a multiple of 16 bytes, that is
strides `(1, align(m, 4))`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checking import Checker
from .numeric import BLOCK, FP8, FP8_MAX, align, ceil_div
from .registry import register_op

__all__ = [
    "cast_to_fp8",
    "per_block_cast_from_fp8",
    "per_block_cast_to_fp8",
    "per_token_cast_from_fp8",
    "per_token_cast_to_fp8",
    "to_mn_major_tma_aligned",
]

HIGH_PRECISION = (torch.bfloat16, torch.float16, torch.float32)
"""What can be quantized, and what a quantized tensor can be cast back to."""
AMAX_FLOOR = 1e-4
"""The default of `amax_floor`: an all-zero block gets the scale 1e-4 / 448. Gradients want a far smaller one."""
SMALLEST_AMAX_FLOOR = 1e-30
"""Below it 448 / amax would leave the range of float32."""


# ----------------------------------------------------------------------------------------------- cast_to_fp8


def cast_to_fp8(x: Tensor) -> Tensor:
    """`x` rounded to the nearest e4m3 value (ties to even), saturating: what exceeds ±448 becomes ±448.

    Args:
        x: any shape, bfloat16, float16 or float32.

    Returns:
        The shape of `x`, float8_e4m3fn. NaN stays NaN, ±inf becomes ±448. (Torch's own cast turned values above 464
        into NaN before 2.12.)

    Raises:
        TypeError: `x` is not a tensor of one of these dtypes.
    """
    return _cast_to_fp8(x)


def _check_cast_to_fp8(x: Tensor) -> None:
    Checker("cast_to_fp8").tensor("x", x, dtype=HIGH_PRECISION)


def cast_to_fp8_reference(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


_cast_to_fp8 = register_op(
    "cast_to_fp8(Tensor x) -> Tensor",
    check=_check_cast_to_fp8,
    fake=lambda x: torch.empty_like(x, dtype=FP8),
    reference=cast_to_fp8_reference,
)


# ------------------------------------------------------------------------------------- per_token_cast_to_fp8


def per_token_cast_to_fp8(
    x: Tensor, *, use_ue8m0: bool = False, mn_major: bool = False, amax_floor: float = AMAX_FLOOR
) -> tuple[Tensor, Tensor]:
    """Quantizes each run of 128 channels of each token with a scale of its own.

    `sf = max(|x|, amax_floor) / 448` over the 128 channels, `q = cast_to_fp8(x / sf)`, computed in float32 as
    `x * (448 / amax)`. A last run of fewer than 128 channels is a block of its own.

    Args:
        x: `[m, k]` or `[groups, m, k]` bfloat16, float16 or float32, contiguous in the last dimension.
        use_ue8m0: round the scales up to powers of two.
        mn_major: return the scales MN-major and TMA-aligned instead of row-major.
        amax_floor: lower bound of a block's largest magnitude, at least 1e-30.

    Returns:
        `q`: `[..., m, k]` float8_e4m3fn.
        `sf`: `[..., m, ceil(k / 128)]` float32, one dequantization scale per token per 128 channels.
        A NaN stays NaN without touching its neighbours. An infinity counts as the largest float32: it comes back as
        ±448 times a scale near 7.6e35, and what else is in its block rounds to zero.

    Raises:
        TypeError: `x` is not a tensor of one of these dtypes.
        ValueError: fewer than two or more than three dimensions, a last dimension that is not contiguous, or a floor
            below 1e-30.
    """
    return _per_token_cast_to_fp8(x, use_ue8m0, mn_major, amax_floor)


def _check_per_token_cast(x: Tensor, use_ue8m0: bool, mn_major: bool, amax_floor: float) -> None:
    check = Checker("per_token_cast_to_fp8")
    check.tensor("x", x, dtype=HIGH_PRECISION, min_dim=2, max_dim=3)
    check.row_stride("x", x, x.element_size())
    check_amax_floor(check, amax_floor)


def check_amax_floor(check: Checker, amax_floor: float) -> None:
    check.true(amax_floor >= SMALLEST_AMAX_FLOOR, "amax_floor", f"at least {SMALLEST_AMAX_FLOOR}", amax_floor)


def empty_quantized(x: Tensor, mn_major: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised `q` and `sf` for `x`, in the layouts that `per_token_cast_to_fp8` promises."""
    *lead, m, k = x.shape
    return x.new_empty(x.shape, dtype=FP8), empty_sf(x, (*lead, m, ceil_div(k, BLOCK)), mn_major)


def empty_sf(like: Tensor, shape: tuple[int, ...], mn_major: bool) -> Tensor:
    """Uninitialised scales of `shape` = `[..., m, k / 128]` beside `like`."""
    if not mn_major:
        return like.new_empty(shape, dtype=torch.float32)
    *lead, m, num_blocks = shape
    strides = [1, align(m, 4)]
    step = align(m, 4) * num_blocks
    for extent in reversed(lead):
        strides.insert(0, step)
        step *= extent
    return torch.empty_strided(shape, strides, dtype=torch.float32, device=like.device)


def per_token_cast_to_fp8_reference(
    x: Tensor, use_ue8m0: bool, mn_major: bool, amax_floor: float
) -> tuple[Tensor, Tensor]:
    k = x.shape[-1]
    blocks = pad(x.float(), (0, align(k, BLOCK) - k)).unflatten(-1, (ceil_div(k, BLOCK), BLOCK))
    sf, inverse = scales(blocks.abs().nan_to_num(nan=0.0).amax(-1), use_ue8m0, amax_floor)
    values = cast_to_fp8_reference(blocks * inverse.unsqueeze(-1)).flatten(-2)[..., :k]
    q, laid_out = empty_quantized(x, mn_major)
    return q.copy_(values), laid_out.copy_(sf)


def scales(amax: Tensor, use_ue8m0: bool, amax_floor: float) -> tuple[Tensor, Tensor]:
    """The dequantization scale of blocks of largest magnitude `amax`, and the factor that quantizes."""
    amax = amax.clamp(amax_floor, torch.finfo(torch.float32).max)
    fp8_max = torch.full_like(amax, FP8_MAX)  # a tensor: torch divides by a number, and a number, through a reciprocal
    if not use_ue8m0:
        return amax / fp8_max, fp8_max / amax
    mantissa, exponent = torch.frexp(amax / fp8_max)  # mantissa in [0.5, 1)
    exponent = exponent - (mantissa == 0.5).int()
    one = torch.ones_like(amax)
    return torch.ldexp(one, exponent), torch.ldexp(one, -exponent)


_per_token_cast_to_fp8 = register_op(
    "per_token_cast_to_fp8(Tensor x, bool use_ue8m0, bool mn_major, float amax_floor) -> (Tensor, Tensor)",
    check=_check_per_token_cast,
    fake=lambda x, use_ue8m0, mn_major, amax_floor: empty_quantized(x, mn_major),
    reference=per_token_cast_to_fp8_reference,
)


# ----------------------------------------------------------------------------------- per_token_cast_from_fp8


def per_token_cast_from_fp8(q: Tensor, sf: Tensor, *, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`q * sf`, each scale spread over its 128 channels: undoes `per_token_cast_to_fp8`.

    Args:
        q: `[..., m, k]` float8_e4m3fn.
        sf: `[..., m, ceil(k / 128)]` float32, in any layout.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        `[..., m, k]` in `out_dtype`, multiplied in float32 and rounded once.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: the shapes do not fit.
    """
    return _per_token_cast_from_fp8(q, sf, out_dtype)


def _check_per_token_cast_from(q: Tensor, sf: Tensor, out_dtype: torch.dtype) -> None:
    check = Checker("per_token_cast_from_fp8")
    *lead, k = check.tensor("q", q, dtype=FP8, min_dim=2)
    check.tensor("sf", sf, (*lead, ceil_div(k, BLOCK)), torch.float32)
    check_out_dtype(check, out_dtype)


def check_out_dtype(check: Checker, out_dtype: torch.dtype, allowed: tuple[torch.dtype, ...] = HIGH_PRECISION) -> None:
    if out_dtype not in allowed:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        check.fail("out_dtype", wanted, str(out_dtype).removeprefix("torch."), TypeError)


def per_token_cast_from_fp8_reference(q: Tensor, sf: Tensor, out_dtype: torch.dtype) -> Tensor:
    k = q.shape[-1]
    return (q.float() * sf.repeat_interleave(BLOCK, dim=-1)[..., :k]).to(out_dtype)


_per_token_cast_from_fp8 = register_op(
    "per_token_cast_from_fp8(Tensor q, Tensor sf, ScalarType out_dtype) -> Tensor",
    check=_check_per_token_cast_from,
    fake=lambda q, sf, out_dtype: q.new_empty(q.shape, dtype=out_dtype),
    reference=per_token_cast_from_fp8_reference,
)


# ------------------------------------------------------------------------------------- per_block_cast_to_fp8


def per_block_cast_to_fp8(
    x: Tensor, *, use_ue8m0: bool = False, amax_floor: float = AMAX_FLOOR
) -> tuple[Tensor, Tensor]:
    """Quantizes each 128 x 128 block of a weight with a scale of its own.

    The formula is that of `per_token_cast_to_fp8`, over blocks. Blocks at the lower and right edge may be smaller:
    576 rows make 5 rows of blocks, the last one of 64.

    Args:
        x: `[..., n, k]` bfloat16, float16 or float32, contiguous in the last dimension.
        use_ue8m0: round the scales up to powers of two.
        amax_floor: lower bound of a block's largest magnitude, at least 1e-30.

    Returns:
        `q`: `[..., n, k]` float8_e4m3fn.
        `sf`: `[..., ceil(n / 128), ceil(k / 128)]` float32; checkpoints call it `weight_scale_inv`.

    Raises:
        TypeError: `x` is not a tensor of one of these dtypes.
        ValueError: fewer than two dimensions, a last dimension that is not contiguous, or a floor below 1e-30.
    """
    return _per_block_cast_to_fp8(x, use_ue8m0, amax_floor)


def _check_per_block_cast(x: Tensor, use_ue8m0: bool, amax_floor: float) -> None:
    check = Checker("per_block_cast_to_fp8")
    check.tensor("x", x, dtype=HIGH_PRECISION, min_dim=2)
    check.row_stride("x", x, x.element_size())
    check_amax_floor(check, amax_floor)


def _fake_per_block_cast(x: Tensor, use_ue8m0: bool, amax_floor: float) -> tuple[Tensor, Tensor]:
    *lead, n, k = x.shape
    grid = (*lead, ceil_div(n, BLOCK), ceil_div(k, BLOCK))
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(grid, dtype=torch.float32)


def per_block_cast_to_fp8_reference(x: Tensor, use_ue8m0: bool, amax_floor: float) -> tuple[Tensor, Tensor]:
    n, k = x.shape[-2:]
    padded = pad(x.float(), (0, align(k, BLOCK) - k, 0, align(n, BLOCK) - n))
    blocks = padded.unflatten(-1, (ceil_div(k, BLOCK), BLOCK)).unflatten(-3, (ceil_div(n, BLOCK), BLOCK))
    sf, inverse = scales(blocks.abs().nan_to_num(nan=0.0).amax((-3, -1)), use_ue8m0, amax_floor)
    q = cast_to_fp8_reference(blocks * inverse[..., :, None, :, None])
    return x.new_empty(x.shape, dtype=FP8).copy_(q.flatten(-2).flatten(-3, -2)[..., :n, :k]), sf


_per_block_cast_to_fp8 = register_op(
    "per_block_cast_to_fp8(Tensor x, bool use_ue8m0, float amax_floor) -> (Tensor, Tensor)",
    check=_check_per_block_cast,
    fake=_fake_per_block_cast,
    reference=per_block_cast_to_fp8_reference,
)


# ----------------------------------------------------------------------------------- per_block_cast_from_fp8


def per_block_cast_from_fp8(q: Tensor, sf: Tensor, *, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`q * sf`, each scale spread over its 128 x 128 block: undoes `per_block_cast_to_fp8`.

    Args:
        q: `[..., n, k]` float8_e4m3fn.
        sf: `[..., ceil(n / 128), ceil(k / 128)]` float32.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        `[..., n, k]` in `out_dtype`, multiplied in float32 and rounded once.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: the shapes do not fit.
    """
    return _per_block_cast_from_fp8(q, sf, out_dtype)


def _check_per_block_cast_from(q: Tensor, sf: Tensor, out_dtype: torch.dtype) -> None:
    check = Checker("per_block_cast_from_fp8")
    *lead, n, k = check.tensor("q", q, dtype=FP8, min_dim=2)
    check.tensor("sf", sf, (*lead, ceil_div(n, BLOCK), ceil_div(k, BLOCK)), torch.float32)
    check_out_dtype(check, out_dtype)


def per_block_cast_from_fp8_reference(q: Tensor, sf: Tensor, out_dtype: torch.dtype) -> Tensor:
    n, k = q.shape[-2:]
    spread = sf.repeat_interleave(BLOCK, dim=-2)[..., :n, :].repeat_interleave(BLOCK, dim=-1)[..., :k]
    return (q.float() * spread).to(out_dtype)


_per_block_cast_from_fp8 = register_op(
    "per_block_cast_from_fp8(Tensor q, Tensor sf, ScalarType out_dtype) -> Tensor",
    check=_check_per_block_cast_from,
    fake=lambda q, sf, out_dtype: q.new_empty(q.shape, dtype=out_dtype),
    reference=per_block_cast_from_fp8_reference,
)


# ----------------------------------------------------------------------------------- to_mn_major_tma_aligned


def to_mn_major_tma_aligned(sf: Tensor) -> Tensor:
    """The same scales in the MN-major TMA-aligned layout (always a copy).

    Args:
        sf: `[..., m, k / 128]` float32, in any layout.

    Returns:
        `[..., m, k / 128]` float32 with last strides `(1, align(m, 4))`.

    Raises:
        TypeError: `sf` is not a float32 tensor.
        ValueError: fewer than two dimensions.
    """
    return _to_mn_major_tma_aligned(sf)


def _check_to_mn_major(sf: Tensor) -> None:
    Checker("to_mn_major_tma_aligned").tensor("sf", sf, dtype=torch.float32, min_dim=2)


_to_mn_major_tma_aligned = register_op(
    "to_mn_major_tma_aligned(Tensor sf) -> Tensor",
    check=_check_to_mn_major,
    fake=lambda sf: empty_sf(sf, tuple(sf.shape), True),
    reference=lambda sf: empty_sf(sf, tuple(sf.shape), True).copy_(sf),
)
