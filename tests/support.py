"""What tests share: numeric gates by row and by tile, guarded and poisoned tensors, quantized random operands."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import deepseek_ops

GPU = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU")])]

BF16_LIMIT = 3e-3
"""Relative L2 error of a correct GEMM with bfloat16 output: bfloat16 rounding alone is 1.3e-3 to 1.8e-3."""
FP32_LIMIT = 5e-4
"""The same with float32 output: Hopper's FP8 accumulator alone is 1.0e-4 to 1.8e-4."""

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)

WILD_OFFSETS = [
    ((2, 5, 9), (None, None, 0, 0, 0, 1, 1, 1, 1, None)),
    ((-3, 4, INT_MAX), (0, 0, 0, 0, 1, 1, 1, 1, 1, 1)),
    ((2, 7, 5), (None, None, 0, 0, 0, 0, 0, None, None, None)),
    ((10, 3, 6), (None,) * 10),
    ((INT_MAX, 0, INT_MIN), (None,) * 10),
    ((11, 12, 13), (None,) * 10),
    ((INT_MIN, INT_MIN, 3), (1, 1, 1) + (None,) * 7),
]
"""Offsets of two groups, with gaps or out of order, and the group of each of ten rows."""


def relative_error(got: Tensor, want: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """`|got - want| / |want|` in float64, over `dim` (None: everything). 0 / 0 is 0, and NaN is infinite."""
    got, want = got.double(), want.double()
    error = torch.linalg.vector_norm(got - want, dim=dim)
    norm = torch.linalg.vector_norm(want, dim=dim)
    ratio = torch.where(error == 0, 0.0, error / norm)
    return ratio.nan_to_num(nan=math.inf, posinf=math.inf)


def assert_rows_close(got: Tensor, want: Tensor, limit: float) -> None:
    """Each row (last dimension) by itself within `limit`, and the names of the first row that is not."""
    assert got.shape == want.shape, f"shape {list(got.shape)}, wanted {list(want.shape)}"
    if got.numel() == 0:
        return
    errors = relative_error(got, want, dim=-1)
    if (errors > limit).any():
        worst = torch.unravel_index(errors.argmax(), errors.shape)
        raise AssertionError(f"row {[int(i) for i in worst]}: error {errors.max():.2e} > {limit:.0e}")


def assert_gemm_close(got: Tensor, want: Tensor, limit: float) -> None:
    """A GEMM's output within `limit` as a whole, by row, by 128 columns and by 128 x 128 tile.

    One number over the whole tensor would pass with whole tiles missing. Slices of fewer than 32 elements are left to
    the other gates: cancellation can dominate them.
    """
    assert got.shape == want.shape, f"shape {list(got.shape)}, wanted {list(want.shape)}"
    if got.numel() == 0:
        return
    m, n = got.shape[-2:]
    assert relative_error(got, want) <= limit, f"tensor: {relative_error(got, want):.2e} > {limit:.0e}"
    if n >= 32:
        assert_rows_close(got, want, limit)
    for column in range(0, n, 128):
        for row in [*range(0, m, 128), None]:
            rows = slice(None) if row is None else slice(row, row + 128)
            tile = (..., rows, slice(column, column + 128))
            if got[tile].numel() >= 32:
                error = relative_error(got[tile], want[tile])
                assert error <= limit, f"tile at row {row}, column {column}: {error:.2e} > {limit:.0e}"


def assert_rounded_once(got: Tensor, want: Tensor, magnitude: Tensor | None = None) -> None:
    """Each element is the float64 `want` rounded once to the dtype of `got`, up to float32's error before that.

    `magnitude` is what that error is relative to, where terms cancel (`|want|` if absent). NaN must meet NaN.
    """
    assert got.shape == want.shape, f"shape {list(got.shape)}, wanted {list(want.shape)}"
    info = torch.finfo(got.dtype)
    half_a_subnormal = info.smallest_normal * info.eps / 2
    limit = info.eps / 2 * want.abs() + 2**-21 * (want if magnitude is None else magnitude).abs() + half_a_subnormal
    wrong = ~((got.double() - want).abs() <= limit) & (got.double() != want) & ~(got.isnan() & want.isnan())
    if wrong.any():
        first = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(f"{int(wrong.sum())} elements, first {list(first)}: {got[first]}, wanted {want[first]}")


def clones(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A call's arguments, its tensors copied in their layouts."""
    return tuple(x.clone(memory_format=torch.preserve_format) if isinstance(x, Tensor) else x for x in args)


def outputs(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """What a call returns and what it may have written, as a flat list."""
    returned = function(*args)
    returned = returned if isinstance(returned, tuple) else (returned,)
    return [x for x in (*returned, *args) if isinstance(x, Tensor)]


def bits(x: Tensor) -> Tensor:
    """The bytes of `x`, row by row: equal bits are more than equal values."""
    return x.new_empty(x.shape).copy_(x).view(torch.uint8)


def assert_same(got: Tensor, want: Tensor) -> None:
    """The same shape, dtype, strides and bits (so that NaN equals itself, and -0.0 is not 0.0)."""
    kind, wanted_kind = ((list(x.shape), x.dtype, x.stride()) for x in (got, want))
    assert kind == wanted_kind, f"{kind}, wanted {wanted_kind}"
    got_bytes, want_bytes = (x.new_empty(x.shape).copy_(x).flatten().view(torch.uint8) for x in (got, want))
    assert torch.equal(got_bytes, want_bytes), f"{int((got_bytes != want_bytes).sum())} bytes differ"


class Guarded:
    """A tensor of given shape and strides inside a larger allocation, poisoned, with bytes of 0xA5 around it."""

    BAND = 512

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str, strides: tuple[int, ...] | None = None):
        strides = strides or tuple(torch.empty(shape, device="meta").stride())
        size = dtype.itemsize
        last = sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
        num_bytes = max(0, (last + 1) * size) if math.prod(shape) else 0
        self._bytes = torch.full((self.BAND + num_bytes + self.BAND,), 0xA5, dtype=torch.uint8, device=device)
        self._inside = self._bytes[self.BAND : self.BAND + num_bytes]
        self._inside.fill_(0xFF)  # NaN in every float format here, -1 in every signed integer
        flat = self._inside.view(dtype) if num_bytes else torch.empty(0, dtype=dtype, device=device)
        self.tensor = flat.as_strided(shape, strides, flat.storage_offset())
        self._gaps = torch.ones(num_bytes // size if num_bytes else 0, dtype=torch.bool, device=device)
        if num_bytes:
            self._gaps.as_strided(shape, strides).fill_(False)

    def assert_intact(self) -> None:
        """Nothing outside the tensor was written: neither around it nor in the gaps between its rows."""
        end = self.BAND + self._inside.numel()
        assert (self._bytes[: self.BAND] == 0xA5).all(), "bytes before the tensor were written"
        assert (self._bytes[end:] == 0xA5).all(), "bytes after the tensor were written"
        if self._gaps.any():
            size = self.tensor.element_size()
            gaps = self._inside.view(-1, size)[self._gaps]
            assert (gaps == 0xFF).all(), "bytes between the tensor's rows were written"


def quantized_operands(
    m: int, n: int, k: int, device: str, *, use_ue8m0: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fresh random `a, sfa, b, sfb` of an FP8 GEMM."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).bfloat16().to(device)
    w = torch.randn(n, k, generator=generator).bfloat16().to(device)
    a, sfa = deepseek_ops.per_token_cast_to_fp8(x, use_ue8m0=use_ue8m0)
    b, sfb = deepseek_ops.per_block_cast_to_fp8(w, use_ue8m0=use_ue8m0)
    return a, sfa, b, sfb


def dequantized_product(a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor) -> Tensor:
    """The GEMM's true result: float64 on the dequantized operands, by plain indexing."""
    k = a.shape[1]
    n = b.shape[0]
    column = torch.arange(k, device=a.device) // 128
    row = torch.arange(n, device=a.device) // 128
    x = a.double() * sfa.double()[:, column]
    w = b.double() * sfb.double()[row][:, column]
    return x @ w.T


def num_left_tiles(m: int, n: int, num_sms: int) -> int:
    """Of the largest tiles, 192 x 128, those that make no full wave: which a plan may share. With two waves above them,
    64 rows or fewer at the end come in tiles of twice the columns."""
    full, low = divmod(m, 192)
    columns = -(-n // 128)
    if 0 < low <= 64 and full * columns >= 2 * num_sms:
        return (full * columns + -(-columns // 2)) % num_sms
    return -(-m // 192) * columns % num_sms
