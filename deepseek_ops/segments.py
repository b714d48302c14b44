"""Who owns a row: offsets `[n + 1]` that cut rows into n segments (sequences of a batch, groups of a GEMM).

Segment i owns the rows `offsets[i] <= row < offsets[i + 1]`. Offsets live on the device and are not trusted: they are
clamped to the rows there are, and each counts as the largest so far, so that after a decrease segments are empty until
that is reached again. No offset, however wild, leads out of bounds or gives a row two owners.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["segments"]


def segments(offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The segments that `offsets` `[n + 1]` cuts `num_rows` rows into, without reading a value on the host.

    Returns:
        `start`, `length`: `[n + 1]` int64; the last entry is an empty segment that stands for "nobody".
        `owner`: `[num_rows]` int64, the segment of each row, n where it is nobody's.
    """
    bounds = offsets.long().clamp(0, num_rows).cummax(0).values
    start = pad(bounds[:-1], (0, 1))
    length = pad(bounds[1:] - bounds[:-1], (0, 1))
    row = torch.arange(num_rows, device=offsets.device)
    segment = torch.arange(start.shape[0], device=offsets.device)[:, None]
    owns = (row >= start[:, None]) & (row < (start + length)[:, None])
    return start, length, torch.where(owns, segment, start.shape[0] - 1).amin(0)
