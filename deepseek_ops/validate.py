"""Checks of what lies inside index tensors, for debugging.

The ops never read a tensor's values on the host. A wild index cannot lead them out of bounds, but neither do they
complain: they skip it. These functions do complain. Each copies its arguments to the host and waits for the device, so
they belong into tests and bug hunts, not into a serving loop, and cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checking import Checker
from .numeric import BLOCK, ceil_div

__all__ = ["validate_block_table", "validate_m_indices", "validate_masked_m", "validate_offsets"]


def validate_m_indices(m_indices: Tensor, num_groups: int) -> None:
    """Checks the layout of `m_grouped_fp8_gemm_nt_contiguous`.

    Args:
        m_indices: `[m]` int32: each a group in `[0, num_groups)`, one per segment of 128 rows, or -1 for padding.
        num_groups: number of groups.

    Raises:
        TypeError: `m_indices` is not an int32 tensor.
        ValueError: names the first row that breaks the rule, and its value.
    """
    Checker("validate_m_indices").tensor("m_indices", m_indices, ("m",), torch.int32)
    groups = m_indices.cpu()
    _require("m_indices", groups, (groups >= -1) & (groups < num_groups), f"a group below {num_groups}, or -1")
    for begin in range(0, groups.shape[0], BLOCK):
        segment = groups[begin : begin + BLOCK]
        live = segment[segment >= 0]
        if live.numel():
            group = int(live[0])
            wanted = f"{group} as earlier in its segment of {BLOCK} rows, or -1"
            _require("m_indices", segment, (segment == group) | (segment == -1), wanted, begin)


def validate_offsets(offsets: Tensor, m: int, *, multiple_of: int = 1) -> None:
    """Checks the offsets of `m_grouped_fp8_gemm_nt_offsets`, `k_grouped_fp8_gemm_nt`, or of sequences in a batch.

    Args:
        offsets: `[g + 1]` int32 in `[0, m]`, not decreasing.
        m: number of rows (or columns, or tokens) that they divide.
        multiple_of: what every offset must be a multiple of, 128 for `k_grouped_fp8_gemm_nt`.

    Raises:
        TypeError: `offsets` is not an int32 tensor.
        ValueError: names the first entry that breaks the rule, and its value.
    """
    Checker("validate_offsets").tensor("offsets", offsets, ("g + 1",), torch.int32)
    values = offsets.cpu()
    _require("offsets", values, (values >= 0) & (values <= m), f"from 0 to {m}")
    _require("offsets", values[1:], values[1:] >= values[:-1], "at least the offset before it", 1)
    _require("offsets", values, values % multiple_of == 0, f"a multiple of {multiple_of}")


def validate_masked_m(masked_m: Tensor, max_m: int) -> None:
    """Checks the layout of `m_grouped_fp8_gemm_nt_masked`.

    Args:
        masked_m: `[g]` int32 in `[0, max_m]`.
        max_m: capacity of a group.

    Raises:
        TypeError: `masked_m` is not an int32 tensor.
        ValueError: names the first group that breaks the rule, and its value.
    """
    Checker("validate_masked_m").tensor("masked_m", masked_m, ("g",), torch.int32)
    counts = masked_m.cpu()
    _require("masked_m", counts, (counts >= 0) & (counts <= max_m), f"from 0 to {max_m}")


def validate_block_table(block_table: Tensor, cache_seqlens: Tensor, num_pages: int, page_size: int) -> None:
    """Checks the paging of `mla_decode` and `mla_cache_gather`.

    Args:
        block_table: `[b, max_pages]` int32. The entries that a request's length needs must lie in `[0, num_pages)`; the
            others may hold anything.
        cache_seqlens: `[b]` int32 in `[0, max_pages * page_size]`.
        num_pages: pages of the cache.
        page_size: tokens of a page.

    Raises:
        TypeError: an argument is not an int32 tensor.
        ValueError: the shapes do not fit, or names the first entry that breaks the rule, and its value.
    """
    check = Checker("validate_block_table")
    b, max_pages = check.tensor("block_table", block_table, ("b", "max_pages"), torch.int32)
    check.tensor("cache_seqlens", cache_seqlens, (b,), torch.int32)
    check.true(page_size >= 1, "page_size", "at least 1", page_size)
    table, seqlens = block_table.cpu(), cache_seqlens.cpu()
    capacity = max_pages * page_size
    _require(
        "cache_seqlens", seqlens, (seqlens >= 0) & (seqlens <= capacity), f"from 0 to {capacity}, what it has pages for"
    )
    for request in range(b):
        pages = table[request, : ceil_div(int(seqlens[request]), page_size)]
        _require(f"block_table[{request}]", pages, (pages >= 0) & (pages < num_pages), f"a page below {num_pages}")


def _require(name: str, values: Tensor, good: Tensor, wanted: str, begin: int = 0) -> None:
    """`values` are the entries of `name` from `begin` on."""
    bad = (~good).nonzero()
    if bad.numel():
        position = int(bad[0])
        entry = f"{name}[{begin + position}]".replace("][", ", ")
        raise ValueError(f"{entry} must be {wanted}, got {int(values[position])}")
