"""Small integer arithmetic and the constants of the FP8 formats, shared by every op family."""

from __future__ import annotations

from typing import Final

import torch

__all__ = ["BLOCK", "FP8", "FP8_MAX", "align", "ceil_div"]

FP8: Final = torch.float8_e4m3fn
FP8_MAX: Final = 448.0
"""The largest finite e4m3 value."""
BLOCK: Final = 128
"""Elements that share one scaling factor: 1 x 128 for activations, 128 x 128 for weights."""


def ceil_div(x: int, y: int) -> int:
    """`x / y`, rounded up."""
    return (x + y - 1) // y


def align(x: int, y: int) -> int:
    """The smallest multiple of `y` that is not below `x`."""
    return ceil_div(x, y) * y
