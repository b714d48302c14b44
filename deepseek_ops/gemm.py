"""Dense FP8 GEMM with fine-grained scaling.

Kernel: csrc/kernels/sm90_fp8_gemm.cuh.  Method: DeepSeek-V3 report (arXiv:2412.19437), section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checking import Checker
from .numeric import BLOCK, FP8, ceil_div
from .quantize import check_out_dtype, per_block_cast_from_fp8_reference, per_token_cast_from_fp8_reference
from .registry import register_op

__all__ = ["fp8_gemm_nt", "fp8_gemm_nt_out"]

GEMM_OUT_DTYPES = (torch.bfloat16, torch.float32)


def fp8_gemm_nt(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
    b_is_constant: bool = False,
) -> Tensor:
    """`d = (a * sfa) @ (b * sfb).T`, accumulated in float32.

    Args:
        a: `[m, k]` float8_e4m3fn, K-major, rows at multiples of 16 bytes. Any `m >= 0`, `k` a multiple of 16.
        sfa: `[m, ceil(k / 128)]` float32, one dequantization scale per token per 128 channels; any layout
            (MN-major reads fastest).
        b: `[n, k]` float8_e4m3fn, K-major, rows at multiples of 16 bytes. `n` a multiple of 8.
        sfb: `[ceil(n / 128), ceil(k / 128)]` float32, one scale per 128 x 128 block.
        out_dtype: bfloat16 or float32.
        batch_invariant: a row's bits depend on that row, `b`, `sfb` and the GPU alone: not on `m` or the other rows.
            Without it they are the same at every call of the same shape, and few rows may share `k` among SMs, which
            is faster (docs/fp8_gemm.md).
        b_is_constant: nothing that is still running on the stream writes `b`, as for weights in inference. The GPU may
            then read it before the work ahead of this call has ended, which hides most of a small call's latency.

    Returns:
        `[m, n]` in `out_dtype`; zeros where `k` is 0.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, alignment or device is not as above.
    """
    return _fp8_gemm_nt(a, sfa, b, sfb, out_dtype, batch_invariant, b_is_constant)


def fp8_gemm_nt_out(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    out: Tensor,
    *,
    accumulate: bool = False,
    batch_invariant: bool = False,
    b_is_constant: bool = False,
) -> None:
    """`fp8_gemm_nt` into `out`, which is overwritten, or added to with `accumulate`.

    Args:
        a, sfa, b, sfb: as in `fp8_gemm_nt`.
        out: `[m, n]` bfloat16 or float32, rows at multiples of 16 bytes, sharing no memory with the inputs.
        accumulate: `out += d`, added in float32 and rounded once.
        batch_invariant, b_is_constant: as in `fp8_gemm_nt`.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, alignment or device is not as above.
    """
    _fp8_gemm_nt_out(a, sfa, b, sfb, out, accumulate, batch_invariant, b_is_constant)


def check_fp8_gemm(
    check: Checker, a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, lead_b: tuple[int | str, ...] = ()
) -> tuple[int, ...]:
    """The operands of one GEMM `[m, k] x [*lead_b, n, k]`; returns `(*lead_b, m, n, k)`."""
    m, k = check.tensor("a", a, ("m", "k"), FP8)
    *lead, n, _ = check.tensor("b", b, (*lead_b, "n", k), FP8)
    check.true(k % 16 == 0, "k", "a multiple of 16", k)
    check.true(n % 8 == 0, "n", "a multiple of 8", n)
    check.tensor("sfa", sfa, (m, ceil_div(k, BLOCK)), torch.float32)
    check.tensor("sfb", sfb, (*lead, ceil_div(n, BLOCK), ceil_div(k, BLOCK)), torch.float32)
    check.row_stride("a", a, 16, distinct=True)
    check.row_stride("b", b, 16, distinct=True)
    return *lead, m, n, k


def check_gemm_out(check: Checker, out: Tensor, shape: tuple[int, ...], *inputs: Tensor) -> None:
    """An output that a GEMM writes into: what TMA can store to, and no memory of an input."""
    check.tensor("out", out, shape, GEMM_OUT_DTYPES)
    check.writable("out", out, *inputs)
    check.row_stride("out", out, 16, distinct=True)


def _check(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
    b_is_constant: bool = False,
) -> None:
    check = Checker("fp8_gemm_nt")
    check_fp8_gemm(check, a, sfa, b, sfb)
    check_out_dtype(check, out_dtype, GEMM_OUT_DTYPES)


def _check_out(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    out: Tensor,
    accumulate: bool,
    batch_invariant: bool = False,
    b_is_constant: bool = False,
) -> None:
    check = Checker("fp8_gemm_nt_out")
    m, n, _ = check_fp8_gemm(check, a, sfa, b, sfb)
    check_gemm_out(check, out, (m, n), a, sfa, b, sfb)


def fp8_gemm_nt_reference(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
    b_is_constant: bool = False,
) -> Tensor:
    """The formula in plain torch: the CPU backend, and what the tests hold the kernel to."""
    a = per_token_cast_from_fp8_reference(a, sfa, torch.float32)
    b = per_block_cast_from_fp8_reference(b, sfb, torch.float32)
    return (a @ b.T).to(out_dtype)


def fp8_gemm_nt_out_reference(
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    out: Tensor,
    accumulate: bool,
    batch_invariant: bool = False,
    b_is_constant: bool = False,
) -> None:
    d = fp8_gemm_nt_reference(a, sfa, b, sfb, torch.float32)
    out.copy_(out + d if accumulate else d)


_fp8_gemm_nt = register_op(
    "fp8_gemm_nt(Tensor a, Tensor sfa, Tensor b, Tensor sfb, ScalarType out_dtype, "
    "bool batch_invariant=False, bool b_is_constant=False) -> Tensor",
    check=_check,
    fake=lambda a, sfa, b, sfb, out_dtype, *flags: a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype),
    reference=fp8_gemm_nt_reference,
)

_fp8_gemm_nt_out = register_op(
    "fp8_gemm_nt_out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor(a!) out, bool accumulate, "
    "bool batch_invariant=False, bool b_is_constant=False) -> ()",
    check=_check_out,
    fake=lambda *args: None,
    reference=fp8_gemm_nt_out_reference,
)
