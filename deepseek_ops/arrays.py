"""The kernels on NumPy and CuPy arrays, without torch: NumPy's on the CPU, CuPy's on its current device and stream.

Neither library has the narrow types, so e4m3 is uint8 and bfloat16 is uint16, bit for bit. The formulas and shapes are
those of the torch ops of the same name.
"""

from __future__ import annotations

from typing import Any

import numpy

from . import _native

__all__ = ["fp8_gemm_nt", "per_token_cast_to_fp8"]

BLOCK = 128  # not from .numeric, which imports torch

Array = Any
"""A numpy.ndarray or a cupy.ndarray."""


def per_token_cast_to_fp8(x: Array, *, use_ue8m0: bool = False, amax_floor: float = 1e-4) -> tuple[Array, Array]:
    """Quantizes each run of 128 columns of each row with a scale of its own.

    Args:
        x: `[m, k]` float32, float16, or uint16 that holds bfloat16; contiguous rows.
        use_ue8m0: round the scales up to powers of two.
        amax_floor: lower bound of a block's largest magnitude, at least 1e-30.

    Returns:
        `q`: `[m, k]` uint8 that holds e4m3. `sf`: `[m, ceil(k / 128)]` float32, to multiply by.

    Raises:
        TypeError: not such an array. ValueError: a shape or stride is not as above.
    """
    library, stream = _library_of("x", x)
    if x.ndim != 2:
        raise ValueError(f"x must be a matrix, got {x.ndim} dimensions")
    m, k = x.shape
    q = library.empty((m, k), numpy.uint8)
    sf = library.empty((m, -(-k // BLOCK)), numpy.float32)
    _native.per_token_cast_to_fp8(x, q, sf, use_ue8m0=use_ue8m0, amax_floor=amax_floor, stream=stream)
    return q, sf


def fp8_gemm_nt(
    a: Array, sfa: Array, b: Array, sfb: Array, *, out: Array | None = None, accumulate: bool = False
) -> Array:
    """`out = (a * sfa) @ (b * sfb).T`, accumulated in float32.

    Args:
        a: `[m, k]` uint8 that holds e4m3, `k` a multiple of 16.
        sfa: `[m, ceil(k / 128)]` float32.
        b: `[n, k]` uint8 that holds e4m3, `n` a multiple of 8.
        sfb: `[ceil(n / 128), ceil(k / 128)]` float32.
        out: `[m, n]` float32, or uint16 that holds bfloat16; a new float32 array when not given.
        accumulate: add to `out` instead of overwriting it.

    Returns:
        `out`.

    Raises:
        TypeError: not such an array. ValueError: a shape or stride is not as above.
    """
    library, stream = _library_of("a", a)
    if out is None:
        out = library.zeros((a.shape[0], len(b)), numpy.float32)
    _native.fp8_gemm_nt(a, sfa, b, sfb, out, accumulate=accumulate, stream=stream)
    return out


def _library_of(name: str, x: Array) -> tuple[Any, int]:
    """The module that makes arrays like argument `name`, and the stream to run on."""
    if isinstance(x, numpy.ndarray):
        return numpy, 0
    if not hasattr(x, "__cuda_array_interface__"):
        raise TypeError(f"{name} must be a CUDA or NumPy array, got {type(x).__name__}")
    import cupy  # only whoever brings a CUDA array needs it

    return cupy, cupy.cuda.get_current_stream().ptr
