"""Grouped bfloat16 GEMM: the experts of a mixture whose weights are not quantized, in one launch.

Kernel: csrc/kernels/sm90_bf16_gemm_swap_ab.cuh, which is made for decoding: few rows a group.

Rows of `a` belong to groups, each with a weight `b[i]` of its own, one group after the other without padding. As in
`grouped_gemm`, offsets live on the device and are not trusted, and a row that is nobody's is zeros where the op
allocates the output and stays untouched where it is given one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checking import Checker
from .grouped_gemm import check_layout, write_owned
from .registry import register_op
from .segments import segments

__all__ = ["m_grouped_bf16_gemm_nt_offsets", "m_grouped_bf16_gemm_nt_offsets_out"]


def m_grouped_bf16_gemm_nt_offsets(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """`d[r] = a[r] @ b[i].T` for the rows `offsets[i] <= r < offsets[i + 1]` of each group i, accumulated in float32.

    A row's bits depend on that row, its group's weight and `k` alone: not on the other rows or groups.

    Args:
        a: `[m, k]` bfloat16, rows at multiples of 16 bytes. Any `m >= 0`, `k` a multiple of 8.
        b: `[g, n, k]` bfloat16, rows at multiples of 16 bytes. `n` a multiple of 8.
        offsets: `[g + 1]` int32, not decreasing. Clamped to `[0, m]`, and each counts as the largest so far.

    Returns:
        `[m, n]` bfloat16; zeros in the rows of no group.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, alignment or device is not as above.
    """
    return _m_grouped_bf16_gemm_nt_offsets(a, b, offsets)


def m_grouped_bf16_gemm_nt_offsets_out(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor) -> None:
    """`m_grouped_bf16_gemm_nt_offsets` into `out`, where the rows of no group stay untouched.

    Args:
        a, b, offsets: as in `m_grouped_bf16_gemm_nt_offsets`.
        out: `[m, n]` bfloat16, rows at multiples of 16 bytes, sharing no memory with the inputs.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, alignment or device is not as above.
    """
    _m_grouped_bf16_gemm_nt_offsets_out(a, b, offsets, out)


def _check_operands(check: Checker, a: Tensor, b: Tensor, offsets: Tensor) -> tuple[int, int]:
    m, k = check.tensor("a", a, ("m", "k"), torch.bfloat16)
    g, n, _ = check.tensor("b", b, ("g", "n", k), torch.bfloat16)
    check.true(k % 8 == 0, "k", "a multiple of 8", k)
    check.true(n % 8 == 0, "n", "a multiple of 8", n)
    check.row_stride("a", a, 16, distinct=True)
    check.row_stride("b", b, 16, distinct=True)
    check_layout(check, "offsets", offsets, g + 1)
    return m, n


def _check(a: Tensor, b: Tensor, offsets: Tensor) -> None:
    _check_operands(Checker("m_grouped_bf16_gemm_nt_offsets"), a, b, offsets)


def _check_out(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor) -> None:
    check = Checker("m_grouped_bf16_gemm_nt_offsets_out")
    shape = _check_operands(check, a, b, offsets)
    check.tensor("out", out, shape, torch.bfloat16)
    check.writable("out", out, a, b, offsets)
    check.row_stride("out", out, 16, distinct=True)


def product_by_group(a: Tensor, b: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """`[m, n]` float32, zeros in nobody's rows, and which rows are somebody's, `[m]`."""
    _, _, group = segments(offsets, a.shape[0])
    d = a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.float32)
    for i in range(b.shape[0]):
        owned = group == i
        if a.device.type == "cpu":
            # Costs the owned rows only. On a GPU their number would have to be waited for.
            rows = owned.nonzero().squeeze(1)
            if rows.numel():
                d[rows] = a[rows].float() @ b[i].float().T
        else:
            d = torch.where(owned[:, None], a.float() @ b[i].float().T, d)
    return d, group < b.shape[0]


def m_grouped_bf16_gemm_nt_offsets_reference(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    d, _ = product_by_group(a, b, offsets)
    return d.to(a.dtype)


def m_grouped_bf16_gemm_nt_offsets_out_reference(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor) -> None:
    d, owned = product_by_group(a, b, offsets)
    write_owned(out, d, owned[:, None], accumulate=False)


_m_grouped_bf16_gemm_nt_offsets = register_op(
    "m_grouped_bf16_gemm_nt_offsets(Tensor a, Tensor b, Tensor offsets) -> Tensor",
    check=_check,
    fake=lambda a, b, offsets: a.new_empty((a.shape[0], b.shape[1])),
    reference=m_grouped_bf16_gemm_nt_offsets_reference,
)

_m_grouped_bf16_gemm_nt_offsets_out = register_op(
    "m_grouped_bf16_gemm_nt_offsets_out(Tensor a, Tensor b, Tensor offsets, Tensor(a!) out) -> ()",
    check=_check_out,
    fake=lambda *args: None,
    reference=m_grouped_bf16_gemm_nt_offsets_out_reference,
)
