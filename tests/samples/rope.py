"""Calls of the rotary embedding."""

import torch

from deepseek_ops import rope_cos_sin
from tests.samples import Bad


def _rope(device):
    positions = torch.tensor([0, 31, 7, 7, 63], device=device)
    return torch.randn(5, 3, 64, device=device).bfloat16(), positions, rope_cos_sin(64, 64, device=device), True


SAMPLES = {"rope": _rope}

BAD_INPUT = [
    Bad("rope", "x is no tensor", lambda x, *rest: (None, *rest), TypeError, "x must be a Tensor, got NoneType"),
    Bad("rope", "x of integers", lambda x, *rest: (x.int(), *rest), TypeError, "x must be bfloat16 or float16 or float32, got int32"),
    Bad("rope", "a vector", lambda x, *rest: (x[0, 0], *rest), ValueError, r"x must be of 2 or more dimensions, got \[64\]"),
    Bad("rope", "an odd width", lambda x, *rest: (x[..., 1:], *rest), ValueError, "x must be even and not empty in its last dimension, got 63"),
    Bad("rope", "no width", lambda x, *rest: (x[..., :0], *rest), ValueError, "x must be even and not empty in its last dimension, got 0"),
    Bad("rope", "x transposed", lambda x, *rest: (x.transpose(1, 2).contiguous().transpose(1, 2), *rest), ValueError, "x must be contiguous in its last dimension, got strides"),
    Bad("rope", "positions one short", lambda x, p, *rest: (x, p[1:], *rest), ValueError, r"positions must be \[5\], got \[4\]"),
    Bad("rope", "positions per head", lambda x, p, *rest: (x, p[:, None].expand(5, 3), *rest), ValueError, r"positions must be \[5\], got \[5, 3\]"),
    Bad("rope", "positions in float", lambda x, p, *rest: (x, p.float(), *rest), TypeError, "positions must be int32 or int64, got float32"),
    Bad("rope", "positions with gaps", lambda x, p, *rest: (x, p.repeat(2)[::2], *rest), ValueError, "positions must be contiguous, got strides"),
    Bad("rope", "positions on another device", lambda x, p, *rest: (x, p.to("meta"), *rest), ValueError, "positions must be on .* like x, got meta"),
    Bad("rope", "a table in bfloat16", lambda x, p, t, i: (x, p, t.bfloat16(), i), TypeError, "cos_sin must be float32, got bfloat16"),
    Bad("rope", "a table of half the width", lambda x, p, t, i: (x, p, t[:, :32], i), ValueError, r"cos_sin must be \[max_position, 64\], got \[64, 32\]"),
    Bad("rope", "an empty table", lambda x, p, t, i: (x, p, t[:0], i), ValueError, "cos_sin must be of one or more positions, got 0"),
    Bad("rope", "a transposed table", lambda x, p, t, i: (x, p, t.T, i), ValueError, "cos_sin must be contiguous in its last dimension, got strides"),
]  # fmt: skip
