"""Grouped FP8 GEMM with fine-grained scaling: one launch for all the experts of a mixture.

Kernel: csrc/kernels/sm90_fp8_gemm.cuh; for few rows csrc/kernels/sm90_fp8_gemm_swap_ab.cuh.
Method: DeepSeek-V3 report (arXiv:2412.19437), section 3.3.

M-grouped: rows of `a` belong to groups, each with a weight `b[i]` of its own. Three layouts say which rows are whose:
*contiguous*, a group index per row, constant within segments of 128 rows; *offsets*, groups one after the other without
padding; *masked*, each group in a slab of fixed capacity. K-grouped, for weight gradients: the columns of both operands
belong to groups, each with an output of its own.

The layouts live on the device and are not trusted: indices out of range are nobody's, offsets and counts are clamped.
A row that is nobody's is zeros where the op allocates the output and stays untouched where it is given one; what such
a row of `a` holds, NaN included, reaches nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checking import Checker
from .gemm import GEMM_OUT_DTYPES, check_fp8_gemm, check_gemm_out, fp8_gemm_nt_reference
from .numeric import BLOCK, FP8, ceil_div
from .quantize import check_out_dtype, per_token_cast_from_fp8_reference
from .registry import register_op
from .segments import segments

__all__ = [
    "k_grouped_fp8_gemm_nt",
    "k_grouped_fp8_gemm_nt_out",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous_out",
    "m_grouped_fp8_gemm_nt_masked",
    "m_grouped_fp8_gemm_nt_masked_out",
    "m_grouped_fp8_gemm_nt_offsets",
    "m_grouped_fp8_gemm_nt_offsets_out",
]


def check_layout(check: Checker, name: str, layout: Tensor, num_entries: int) -> None:
    check.tensor(name, layout, (num_entries,), torch.int32)
    check.contiguous(name, layout)


def write_group(d: Tensor, a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, owned: Tensor) -> None:
    """`d = (a * sfa) @ (b * sfb).T` in the rows that are `owned` `[m]`; the others stay."""
    if a.device.type == "cpu":
        # Costs the owned rows only. On a GPU their number would have to be waited for.
        rows = owned.nonzero().squeeze(1)
        if rows.numel():
            d[rows] = fp8_gemm_nt_reference(a[rows], sfa[rows], b, sfb, torch.float32)
    else:
        d.copy_(torch.where(owned[:, None], fp8_gemm_nt_reference(a, sfa, b, sfb, torch.float32), d))


def m_grouped_reference(a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, group: Tensor) -> Tensor:
    """`[m, n]` float32 of rows that each name their `group` `[m]`; zeros in nobody's."""
    d = a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.float32)
    for i in range(b.shape[0]):
        write_group(d, a, sfa, b[i], sfb[i], group == i)
    return d


def write_owned(out: Tensor, d: Tensor, owned: Tensor, accumulate: bool) -> None:
    """`d` into `out`, overwriting or adding, where `owned`; the rest of `out` stays as it is."""
    out.copy_(torch.where(owned, (out + d if accumulate else d).to(out.dtype), out))


# --------------------------------------------------------------------------- m_grouped_fp8_gemm_nt_contiguous


def m_grouped_fp8_gemm_nt_contiguous(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, m_indices: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """`d[r] = (a[r] * sfa[r]) @ (b[i] * sfb[i]).T` with `i = m_indices[r]`, accumulated in float32.

    Args:
        a: `[m, k]` float8_e4m3fn, rows at multiples of 16 bytes. Any `m >= 0`, `k` a multiple of 16.
        sfa: `[m, ceil(k / 128)]` float32, one dequantization scale per token per 128 channels; any layout.
        b: `[g, n, k]` float8_e4m3fn, rows at multiples of 16 bytes. `n` a multiple of 8.
        sfb: `[g, ceil(n / 128), ceil(k / 128)]` float32, one scale per 128 x 128 block.
        m_indices: `[m]` int32, the group of each row; -1 (or anything else outside `[0, g)`) marks padding. Apart from
            padding it must be constant within each segment of 128 rows, which are counted from row 0: what the rows
            of a segment of several groups get is undefined.
        out_dtype: bfloat16 or float32.

    Returns:
        `[m, n]` in `out_dtype`; zeros in padding rows.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, alignment or device is not as above.
    """
    return _m_grouped_fp8_gemm_nt_contiguous(a, sfa, b, sfb, m_indices, out_dtype)


def m_grouped_fp8_gemm_nt_contiguous_out(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, m_indices: Tensor, out: Tensor, *, accumulate: bool = False
) -> None:
    """`m_grouped_fp8_gemm_nt_contiguous` into `out`, whose padding rows stay untouched.

    Args:
        a, sfa, b, sfb, m_indices: as in `m_grouped_fp8_gemm_nt_contiguous`.
        out: `[m, n]` bfloat16 or float32, rows at multiples of 16 bytes, sharing no memory with the inputs.
        accumulate: `out += d`, added in float32 and rounded once.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, alignment or device is not as above.
    """
    _m_grouped_fp8_gemm_nt_contiguous_out(a, sfa, b, sfb, m_indices, out, accumulate)


def _check_contiguous(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, m_indices: Tensor, out_dtype: torch.dtype
) -> None:
    check = Checker("m_grouped_fp8_gemm_nt_contiguous")
    _, m, _, _ = check_fp8_gemm(check, a, sfa, b, sfb, ("g",))
    check_layout(check, "m_indices", m_indices, m)
    check_out_dtype(check, out_dtype, GEMM_OUT_DTYPES)


def _check_contiguous_out(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, m_indices: Tensor, out: Tensor, accumulate: bool
) -> None:
    check = Checker("m_grouped_fp8_gemm_nt_contiguous_out")
    _, m, n, _ = check_fp8_gemm(check, a, sfa, b, sfb, ("g",))
    check_layout(check, "m_indices", m_indices, m)
    check_gemm_out(check, out, (m, n), a, sfa, b, sfb, m_indices)


def m_grouped_fp8_gemm_nt_contiguous_reference(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, m_indices: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return m_grouped_reference(a, sfa, b, sfb, m_indices).to(out_dtype)


def m_grouped_fp8_gemm_nt_contiguous_out_reference(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, m_indices: Tensor, out: Tensor, accumulate: bool
) -> None:
    d = m_grouped_reference(a, sfa, b, sfb, m_indices)
    owned = (m_indices >= 0) & (m_indices < b.shape[0])
    write_owned(out, d, owned[:, None], accumulate)


_m_grouped_fp8_gemm_nt_contiguous = register_op(
    "m_grouped_fp8_gemm_nt_contiguous(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor m_indices, "
    "ScalarType out_dtype) -> Tensor",
    check=_check_contiguous,
    fake=lambda a, sfa, b, sfb, m_indices, out_dtype: a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype),
    reference=m_grouped_fp8_gemm_nt_contiguous_reference,
)

_m_grouped_fp8_gemm_nt_contiguous_out = register_op(
    "m_grouped_fp8_gemm_nt_contiguous_out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor m_indices, "
    "Tensor(a!) out, bool accumulate) -> ()",
    check=_check_contiguous_out,
    fake=lambda *args: None,
    reference=m_grouped_fp8_gemm_nt_contiguous_out_reference,
)


# ------------------------------------------------------------------------------ m_grouped_fp8_gemm_nt_offsets


def m_grouped_fp8_gemm_nt_offsets(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, offsets: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """`d[r] = (a[r] * sfa[r]) @ (b[i] * sfb[i]).T` for the rows `offsets[i] <= r < offsets[i + 1]` of each group i.

    Groups follow each other without padding, of any sizes.

    Args:
        a: `[m, k]` float8_e4m3fn, rows at multiples of 16 bytes. Any `m >= 0`, `k` a multiple of 16.
        sfa: `[m, ceil(k / 128)]` float32, one dequantization scale per token per 128 channels; any layout.
        b: `[g, n, k]` float8_e4m3fn, rows at multiples of 16 bytes. `n` a multiple of 8.
        sfb: `[g, ceil(n / 128), ceil(k / 128)]` float32, one scale per 128 x 128 block.
        offsets: `[g + 1]` int32, not decreasing. Clamped to `[0, m]`; a decreasing pair is an empty group, and a row
            that several groups then claim gets the product of one of them.
        out_dtype: bfloat16 or float32.

    Returns:
        `[m, n]` in `out_dtype`; zeros in the rows of no group.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, alignment or device is not as above.
    """
    return _m_grouped_fp8_gemm_nt_offsets(a, sfa, b, sfb, offsets, out_dtype)


def m_grouped_fp8_gemm_nt_offsets_out(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, offsets: Tensor, out: Tensor, *, accumulate: bool = False
) -> None:
    """`m_grouped_fp8_gemm_nt_offsets` into `out`, where the rows of no group stay untouched.

    Args:
        a, sfa, b, sfb, offsets: as in `m_grouped_fp8_gemm_nt_offsets`. With `accumulate`, offsets that decrease may
            add several groups' products to a row.
        out: `[m, n]` bfloat16 or float32, rows at multiples of 16 bytes, sharing no memory with the inputs.
        accumulate: `out += d`, added in float32 and rounded once.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, alignment or device is not as above.
    """
    _m_grouped_fp8_gemm_nt_offsets_out(a, sfa, b, sfb, offsets, out, accumulate)


def _check_offsets(a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> None:
    check = Checker("m_grouped_fp8_gemm_nt_offsets")
    g, _, _, _ = check_fp8_gemm(check, a, sfa, b, sfb, ("g",))
    check_layout(check, "offsets", offsets, g + 1)
    check_out_dtype(check, out_dtype, GEMM_OUT_DTYPES)


def _check_offsets_out(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, offsets: Tensor, out: Tensor, accumulate: bool
) -> None:
    check = Checker("m_grouped_fp8_gemm_nt_offsets_out")
    g, m, n, _ = check_fp8_gemm(check, a, sfa, b, sfb, ("g",))
    check_layout(check, "offsets", offsets, g + 1)
    check_gemm_out(check, out, (m, n), a, sfa, b, sfb, offsets)


def m_grouped_fp8_gemm_nt_offsets_reference(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    _, _, group = segments(offsets, a.shape[0])
    return m_grouped_reference(a, sfa, b, sfb, group).to(out_dtype)


def m_grouped_fp8_gemm_nt_offsets_out_reference(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, offsets: Tensor, out: Tensor, accumulate: bool
) -> None:
    _, _, group = segments(offsets, a.shape[0])
    d = m_grouped_reference(a, sfa, b, sfb, group)
    write_owned(out, d, (group < b.shape[0])[:, None], accumulate)


_m_grouped_fp8_gemm_nt_offsets = register_op(
    "m_grouped_fp8_gemm_nt_offsets(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor offsets, "
    "ScalarType out_dtype) -> Tensor",
    check=_check_offsets,
    fake=lambda a, sfa, b, sfb, offsets, out_dtype: a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype),
    reference=m_grouped_fp8_gemm_nt_offsets_reference,
)

_m_grouped_fp8_gemm_nt_offsets_out = register_op(
    "m_grouped_fp8_gemm_nt_offsets_out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor offsets, "
    "Tensor(a!) out, bool accumulate) -> ()",
    check=_check_offsets_out,
    fake=lambda *args: None,
    reference=m_grouped_fp8_gemm_nt_offsets_out_reference,
)


# ------------------------------------------------------------------------------- m_grouped_fp8_gemm_nt_masked


def m_grouped_fp8_gemm_nt_masked(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    masked_m: Tensor,
    *,
    expected_m: int | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    b_is_constant: bool = False,
) -> Tensor:
    """`d[i, r] = (a[i, r] * sfa[i, r]) @ (b[i] * sfb[i]).T` for the rows `r < masked_m[i]` of each group i.

    Args:
        a: `[g, max_m, k]` float8_e4m3fn, rows at multiples of 16 bytes. `k` a multiple of 16.
        sfa: `[g, max_m, ceil(k / 128)]` float32, one dequantization scale per token per 128 channels; any layout.
        b: `[g, n, k]` float8_e4m3fn, rows at multiples of 16 bytes. `n` a multiple of 8.
        sfb: `[g, ceil(n / 128), ceil(k / 128)]` float32, one scale per 128 x 128 block.
        masked_m: `[g]` int32, rows of each group, clamped to `[0, max_m]`.
        expected_m: a guess of `masked_m`'s mean, at least 1. It helps to choose a tile and changes no result.
        out_dtype: bfloat16 or float32.
        b_is_constant: as in `fp8_gemm_nt`. It helps where few rows are expected.

    Returns:
        `[g, max_m, n]` in `out_dtype`; zeros in the rows from `masked_m[i]` on.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, alignment or device is not as above, or `expected_m` is below 1.
    """
    return _m_grouped_fp8_gemm_nt_masked(a, sfa, b, sfb, masked_m, expected_m, out_dtype, b_is_constant)


def m_grouped_fp8_gemm_nt_masked_out(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    masked_m: Tensor,
    out: Tensor,
    *,
    expected_m: int | None = None,
    accumulate: bool = False,
    b_is_constant: bool = False,
) -> None:
    """`m_grouped_fp8_gemm_nt_masked` into `out`, where the rows from `masked_m[i]` on stay untouched.

    Args:
        a, sfa, b, sfb, masked_m, expected_m, b_is_constant: as in `m_grouped_fp8_gemm_nt_masked`.
        out: `[g, max_m, n]` bfloat16 or float32, rows at multiples of 16 bytes, sharing no memory with the inputs.
        accumulate: `out += d`, added in float32 and rounded once.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, alignment or device is not as above, or `expected_m` is below 1.
    """
    _m_grouped_fp8_gemm_nt_masked_out(a, sfa, b, sfb, masked_m, out, expected_m, accumulate, b_is_constant)


def _check_masked_operands(
    check: Checker, a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, masked_m: Tensor, expected_m: int | None
) -> tuple[int, int, int]:
    g, max_m, k = check.tensor("a", a, ("g", "max_m", "k"), FP8)
    _, n, _ = check.tensor("b", b, (g, "n", k), FP8)
    check.true(k % 16 == 0, "k", "a multiple of 16", k)
    check.true(n % 8 == 0, "n", "a multiple of 8", n)
    check.tensor("sfa", sfa, (g, max_m, ceil_div(k, BLOCK)), torch.float32)
    check.tensor("sfb", sfb, (g, ceil_div(n, BLOCK), ceil_div(k, BLOCK)), torch.float32)
    check.row_stride("a", a, 16, distinct=True)
    check.row_stride("b", b, 16, distinct=True)
    check_layout(check, "masked_m", masked_m, g)
    check.true(expected_m is None or expected_m >= 1, "expected_m", "at least 1, or None", expected_m)
    return g, max_m, n


def _check_masked(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    masked_m: Tensor,
    expected_m: int | None,
    out_dtype: torch.dtype,
    b_is_constant: bool = False,
) -> None:
    check = Checker("m_grouped_fp8_gemm_nt_masked")
    _check_masked_operands(check, a, sfa, b, sfb, masked_m, expected_m)
    check_out_dtype(check, out_dtype, GEMM_OUT_DTYPES)


def _check_masked_out(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    masked_m: Tensor,
    out: Tensor,
    expected_m: int | None,
    accumulate: bool,
    b_is_constant: bool = False,
) -> None:
    check = Checker("m_grouped_fp8_gemm_nt_masked_out")
    shape = _check_masked_operands(check, a, sfa, b, sfb, masked_m, expected_m)
    check_gemm_out(check, out, shape, a, sfa, b, sfb, masked_m)


def masked_product(a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, masked_m: Tensor) -> tuple[Tensor, Tensor]:
    """`[g, max_m, n]` float32, zeros in nobody's rows, and which rows are somebody's, `[g, max_m]`."""
    g, max_m, _ = a.shape
    owned = torch.arange(max_m, device=a.device) < masked_m[:, None]
    d = a.new_zeros((g, max_m, b.shape[1]), dtype=torch.float32)
    for i in range(g):
        write_group(d[i], a[i], sfa[i], b[i], sfb[i], owned[i])
    return d, owned


def m_grouped_fp8_gemm_nt_masked_reference(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    masked_m: Tensor,
    expected_m: int | None,
    out_dtype: torch.dtype,
    b_is_constant: bool = False,
) -> Tensor:
    d, _ = masked_product(a, sfa, b, sfb, masked_m)
    return d.to(out_dtype)


def m_grouped_fp8_gemm_nt_masked_out_reference(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    masked_m: Tensor,
    out: Tensor,
    expected_m: int | None,
    accumulate: bool,
    b_is_constant: bool = False,
) -> None:
    d, owned = masked_product(a, sfa, b, sfb, masked_m)
    write_owned(out, d, owned[..., None], accumulate)


_m_grouped_fp8_gemm_nt_masked = register_op(
    "m_grouped_fp8_gemm_nt_masked(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor masked_m, SymInt? expected_m, "
    "ScalarType out_dtype, bool b_is_constant=False) -> Tensor",
    check=_check_masked,
    fake=lambda a, sfa, b, sfb, masked_m, expected_m, out_dtype, *flags: a.new_empty(
        (*a.shape[:2], b.shape[1]), dtype=out_dtype
    ),
    reference=m_grouped_fp8_gemm_nt_masked_reference,
)

_m_grouped_fp8_gemm_nt_masked_out = register_op(
    "m_grouped_fp8_gemm_nt_masked_out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor masked_m, Tensor(a!) out, "
    "SymInt? expected_m, bool accumulate, bool b_is_constant=False) -> ()",
    check=_check_masked_out,
    fake=lambda *args: None,
    reference=m_grouped_fp8_gemm_nt_masked_out_reference,
)


# -------------------------------------------------------------------------------------- k_grouped_fp8_gemm_nt


def k_grouped_fp8_gemm_nt(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, k_offsets: Tensor, *, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """`d[i] = (a * sfa) @ (b * sfb).T` over the columns `k_offsets[i] <= c < k_offsets[i + 1]` of each group i.

    The gradient of a mixture's weights: the columns are tokens, sorted by expert, and `d[i]` is expert i's gradient.

    Args:
        a: `[m, k_sum]` float8_e4m3fn, rows at multiples of 16 bytes. `k_sum` a multiple of 128.
        sfa: `[m, k_sum / 128]` float32, one dequantization scale per row per 128 columns; any layout.
        b: `[n, k_sum]` float8_e4m3fn, rows at multiples of 16 bytes. `n` a multiple of 8.
        sfb: `[n, k_sum / 128]` float32, as `sfa`.
        k_offsets: `[g + 1]` int32, multiples of 128 (groups padded with zeros), not decreasing. Other values are
            rounded down to a multiple of 128 and clamped to `[0, k_sum]`, and each counts as the largest so far.
        out_dtype: bfloat16 or float32.

    Returns:
        `[g, m, n]` in `out_dtype`; zeros for an empty group.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, alignment or device is not as above.
    """
    return _k_grouped_fp8_gemm_nt(a, sfa, b, sfb, k_offsets, out_dtype)


def k_grouped_fp8_gemm_nt_out(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, k_offsets: Tensor, out: Tensor, *, accumulate: bool = False
) -> None:
    """`k_grouped_fp8_gemm_nt` into `out`. An empty group is overwritten by zeros, and untouched with `accumulate`.

    Args:
        a, sfa, b, sfb, k_offsets: as in `k_grouped_fp8_gemm_nt`.
        out: `[g, m, n]` bfloat16 or float32, rows at multiples of 16 bytes, sharing no memory with the inputs.
        accumulate: `out += d`, added in float32 and rounded once.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, alignment or device is not as above.
    """
    _k_grouped_fp8_gemm_nt_out(a, sfa, b, sfb, k_offsets, out, accumulate)


def _check_k_grouped_operands(
    check: Checker, a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, k_offsets: Tensor
) -> tuple[int, int, int]:
    m, k_sum = check.tensor("a", a, ("m", "k_sum"), FP8)
    n, _ = check.tensor("b", b, ("n", k_sum), FP8)
    check.true(k_sum % BLOCK == 0, "k_sum", f"a multiple of {BLOCK}", k_sum)
    check.true(n % 8 == 0, "n", "a multiple of 8", n)
    check.tensor("sfa", sfa, (m, k_sum // BLOCK), torch.float32)
    check.tensor("sfb", sfb, (n, k_sum // BLOCK), torch.float32)
    check.row_stride("a", a, 16, distinct=True)
    check.row_stride("b", b, 16, distinct=True)
    (num_offsets,) = check.tensor("k_offsets", k_offsets, ("g + 1",), torch.int32)
    check.true(num_offsets >= 1, "k_offsets", "of one or more offsets", num_offsets)
    check.contiguous("k_offsets", k_offsets)
    return num_offsets - 1, m, n


def _check_k_grouped(a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, k_offsets: Tensor, out_dtype: torch.dtype) -> None:
    check = Checker("k_grouped_fp8_gemm_nt")
    _check_k_grouped_operands(check, a, sfa, b, sfb, k_offsets)
    check_out_dtype(check, out_dtype, GEMM_OUT_DTYPES)


def _check_k_grouped_out(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, k_offsets: Tensor, out: Tensor, accumulate: bool
) -> None:
    check = Checker("k_grouped_fp8_gemm_nt_out")
    shape = _check_k_grouped_operands(check, a, sfa, b, sfb, k_offsets)
    check_gemm_out(check, out, shape, a, sfa, b, sfb, k_offsets)


def k_grouped_product(a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, k_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """`[g, m, n]` float32, and the sizes of the groups `[g]`."""
    x = per_token_cast_from_fp8_reference(a, sfa, torch.float32)
    y = per_token_cast_from_fp8_reference(b, sfb, torch.float32)
    bounds = k_offsets.clamp(0, a.shape[1]).cummax(0).values // BLOCK * BLOCK
    begin, end = bounds[:-1], bounds[1:]
    column = torch.arange(a.shape[1], device=a.device)
    d = a.new_zeros((begin.shape[0], a.shape[0], b.shape[0]), dtype=torch.float32)
    for i in range(begin.shape[0]):
        owned = (column >= begin[i]) & (column < end[i])
        columns = owned.nonzero().squeeze(1) if a.device.type == "cpu" else slice(None)  # as in write_group
        d[i] = torch.where(owned, x, 0)[:, columns] @ torch.where(owned, y, 0)[:, columns].T
    return d, (end - begin).clamp(min=0)


def k_grouped_fp8_gemm_nt_reference(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, k_offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    d, _ = k_grouped_product(a, sfa, b, sfb, k_offsets)
    return d.to(out_dtype)


def k_grouped_fp8_gemm_nt_out_reference(
    a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, k_offsets: Tensor, out: Tensor, accumulate: bool
) -> None:
    d, sizes = k_grouped_product(a, sfa, b, sfb, k_offsets)
    written = sizes > 0 if accumulate else torch.ones_like(sizes, dtype=torch.bool)
    write_owned(out, d, written[:, None, None], accumulate)


_k_grouped_fp8_gemm_nt = register_op(
    "k_grouped_fp8_gemm_nt(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor k_offsets, ScalarType out_dtype) "
    "-> Tensor",
    check=_check_k_grouped,
    fake=lambda a, sfa, b, sfb, k_offsets, out_dtype: a.new_empty(
        (k_offsets.shape[0] - 1, a.shape[0], b.shape[0]), dtype=out_dtype
    ),
    reference=k_grouped_fp8_gemm_nt_reference,
)

_k_grouped_fp8_gemm_nt_out = register_op(
    "k_grouped_fp8_gemm_nt_out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor k_offsets, Tensor(a!) out, "
    "bool accumulate) -> ()",
    check=_check_k_grouped_out,
    fake=lambda *args: None,
    reference=k_grouped_fp8_gemm_nt_out_reference,
)
