"""Calls of the grouped GEMMs."""

from __future__ import annotations

import torch

from deepseek_ops import per_block_cast_to_fp8, per_token_cast_to_fp8
from tests.samples import Arguments, Bad, replace


def _operands(device: str) -> Arguments:
    """300 rows, 3 groups of 136 x 272."""
    x, w = torch.randn(300, 272, device=device).bfloat16(), torch.randn(3, 136, 272, device=device).bfloat16()
    return *per_token_cast_to_fp8(x), *per_block_cast_to_fp8(w)


def _masked_operands(device: str) -> Arguments:
    x, w = torch.randn(3, 40, 272, device=device).bfloat16(), torch.randn(3, 136, 272, device=device).bfloat16()
    counts = torch.tensor([40, 0, 7], dtype=torch.int32, device=device)
    return *per_token_cast_to_fp8(x), *per_block_cast_to_fp8(w), counts


def _k_grouped_operands(device: str) -> Arguments:
    x, y = torch.randn(72, 512, device=device).bfloat16(), torch.randn(136, 512, device=device).bfloat16()
    offsets = torch.tensor([0, 128, 128, 512], dtype=torch.int32, device=device)
    return *per_token_cast_to_fp8(x), *per_token_cast_to_fp8(y), offsets


def _m_indices(device: str) -> torch.Tensor:
    groups = torch.tensor([2, -1, 0], dtype=torch.int32, device=device)
    return groups.repeat_interleave(128)[:300].contiguous()


def _offsets(device: str) -> torch.Tensor:
    return torch.tensor([0, 131, 131, 299], dtype=torch.int32, device=device)


def _out(device: str, *shape: int) -> torch.Tensor:
    return torch.ones(shape, device=device).bfloat16()


SAMPLES = {
    "m_grouped_fp8_gemm_nt_contiguous": lambda device: (*_operands(device), _m_indices(device), torch.bfloat16),
    "m_grouped_fp8_gemm_nt_contiguous_out": lambda device: (*_operands(device), _m_indices(device), _out(device, 300, 136), True),
    "m_grouped_fp8_gemm_nt_offsets": lambda device: (*_operands(device), _offsets(device), torch.float32),
    "m_grouped_fp8_gemm_nt_offsets_out": lambda device: (*_operands(device), _offsets(device), _out(device, 300, 136), False),
    "m_grouped_fp8_gemm_nt_masked": lambda device: (*_masked_operands(device), 16, torch.bfloat16, True),
    "m_grouped_fp8_gemm_nt_masked_out": lambda device: (*_masked_operands(device), _out(device, 3, 40, 136), None, True, False),
    "k_grouped_fp8_gemm_nt": lambda device: (*_k_grouped_operands(device), torch.float32),
    "k_grouped_fp8_gemm_nt_out": lambda device: (*_k_grouped_operands(device), _out(device, 3, 72, 136), True),
}  # fmt: skip


def _bad_layouts(op: str, layout: str, length: int, masked: bool = False) -> list[Bad]:
    """What is refused in the layout of every M-grouped op, in both of its forms."""
    return [
        bad
        for form in (op, f"{op}_out")
        for bad in (
            Bad(form, f"{layout} in int64", replace(4, lambda x: x.long()), TypeError, f"{layout} must be int32, got int64"),
            Bad(form, f"{layout} one short", replace(4, lambda x: x[1:]), ValueError, rf"{layout} must be \[{length}\], got \[{length - 1}\]"),
            Bad(form, f"{layout} with gaps", replace(4, lambda x: x.repeat(2)[::2]), ValueError, f"{layout} must be contiguous, got strides"),
            Bad(form, f"{layout} is a list", replace(4, lambda x: [0]), TypeError, f"{layout} must be a Tensor, got list") if op.startswith("k")
            else Bad(form, "b of another group count", replace(2, lambda b: b[1:]), ValueError, r"b must be \[3, n, 272\], got \[2, 136, 272\]" if masked else r"sfb must be \[2, 2, 3\], got \[3, 2, 3\]"),
        )
    ]  # fmt: skip


def _bad_outs(op: str, shape: str, short: str) -> list[Bad]:
    return [
        Bad(op, "out one short", replace(5, lambda x: x[1:]), ValueError, rf"out must be \[{shape}\], got \[{short}\]"),
        Bad(op, "out in float16", replace(5, lambda x: x.half()), TypeError, "out must be bfloat16 or float32, got float16"),
        Bad(op, "out transposed", replace(5, lambda x: x.mT.contiguous().mT), ValueError, "out must be contiguous in its last dimension"),
        Bad(op, "out overlaps itself", replace(5, lambda x: x[:1].expand(x.shape)), ValueError, "out must be free of internal overlap"),
        Bad(op, "out over sfa", lambda a, sfa, b, sfb, layout, out, *rest: (a, torch.as_strided(out.view(torch.float32), sfa.shape, sfa.stride()), b, sfb, layout, out, *rest), ValueError, "out must be apart from the inputs in memory"),
    ]  # fmt: skip


BAD_INPUT = [
    *_bad_layouts("m_grouped_fp8_gemm_nt_contiguous", "m_indices", 300),
    *_bad_layouts("m_grouped_fp8_gemm_nt_offsets", "offsets", 4),
    *_bad_layouts("m_grouped_fp8_gemm_nt_masked", "masked_m", 3, masked=True),
    *_bad_outs("m_grouped_fp8_gemm_nt_contiguous_out", "300, 136", "299, 136"),
    *_bad_outs("m_grouped_fp8_gemm_nt_offsets_out", "300, 136", "299, 136"),
    *_bad_outs("m_grouped_fp8_gemm_nt_masked_out", "3, 40, 136", "2, 40, 136"),
    *_bad_outs("k_grouped_fp8_gemm_nt_out", "3, 72, 136", "2, 72, 136"),
    Bad("m_grouped_fp8_gemm_nt_contiguous", "one weight for all", replace(2, lambda b: b[0]), ValueError, r"b must be \[g, n, 272\], got \[136, 272\]"),
    Bad("m_grouped_fp8_gemm_nt_contiguous", "n not a multiple of 8", replace(2, lambda b: b[:, :132]), ValueError, "n must be a multiple of 8, got 132"),
    Bad("m_grouped_fp8_gemm_nt_contiguous", "k not a multiple of 16", lambda a, sfa, b, *rest: (a[:, :264], sfa, b[..., :264], *rest), ValueError, "k must be a multiple of 16, got 264"),
    Bad("m_grouped_fp8_gemm_nt_contiguous", "scales of another layout", replace(3, lambda x: x.mT.contiguous()), ValueError, r"sfb must be \[3, 2, 3\], got \[3, 3, 2\]"),
    Bad("m_grouped_fp8_gemm_nt_contiguous", "into float16", replace(5, lambda x: torch.float16), TypeError, "out_dtype must be bfloat16 or float32, got float16"),
    Bad("m_grouped_fp8_gemm_nt_offsets", "b transposed", replace(2, lambda b: b.mT.contiguous().mT), ValueError, "b must be contiguous in its last dimension"),
    Bad("m_grouped_fp8_gemm_nt_offsets", "sfa one row short", replace(1, lambda x: x[1:]), ValueError, r"sfa must be \[300, 3\], got \[299, 3\]"),
    Bad("m_grouped_fp8_gemm_nt_masked", "a flat", replace(0, lambda a: a.flatten(0, 1)), ValueError, r"a must be \[g, max_m, k\], got \[120, 272\]"),
    Bad("m_grouped_fp8_gemm_nt_masked", "a in bfloat16", replace(0, lambda a: a.bfloat16()), TypeError, "a must be float8_e4m3fn, got bfloat16"),
    Bad("m_grouped_fp8_gemm_nt_masked", "sfa of another capacity", replace(1, lambda x: x[:, 1:]), ValueError, r"sfa must be \[3, 40, 3\], got \[3, 39, 3\]"),
    Bad("m_grouped_fp8_gemm_nt_masked", "sfb packed", replace(3, lambda x: x.int()), TypeError, "sfb must be float32, got int32"),
    Bad("m_grouped_fp8_gemm_nt_masked", "nothing expected", replace(5, lambda x: 0), ValueError, "expected_m must be at least 1, or None, got 0"),
    Bad("m_grouped_fp8_gemm_nt_masked", "into int32", replace(6, lambda x: torch.int32), TypeError, "out_dtype must be bfloat16 or float32, got int32"),
    Bad("m_grouped_fp8_gemm_nt_masked_out", "nothing expected", replace(6, lambda x: -1), ValueError, "expected_m must be at least 1, or None, got -1"),
    Bad("k_grouped_fp8_gemm_nt", "a of rank 3", replace(0, lambda a: a[None]), ValueError, r"a must be \[m, k_sum\], got \[1, 72, 512\]"),
    Bad("k_grouped_fp8_gemm_nt", "b of another width", replace(2, lambda b: b[:, :384]), ValueError, r"b must be \[n, 512\], got \[136, 384\]"),
    Bad("k_grouped_fp8_gemm_nt", "k_sum not a multiple of 128", lambda a, sfa, b, *rest: (a[:, :400], sfa, b[:, :400], *rest), ValueError, "k_sum must be a multiple of 128, got 400"),
    Bad("k_grouped_fp8_gemm_nt", "n not a multiple of 8", replace(2, lambda b: b[:132]), ValueError, "n must be a multiple of 8, got 132"),
    Bad("k_grouped_fp8_gemm_nt", "sfa one block short", replace(1, lambda x: x[:, 1:]), ValueError, r"sfa must be \[72, 4\], got \[72, 3\]"),
    Bad("k_grouped_fp8_gemm_nt", "sfb in blocks", replace(3, lambda x: x[:2]), ValueError, r"sfb must be \[136, 4\], got \[2, 4\]"),
    Bad("k_grouped_fp8_gemm_nt", "no offsets", replace(4, lambda x: x[:0]), ValueError, "k_offsets must be of one or more offsets, got 0"),
    Bad("k_grouped_fp8_gemm_nt", "offsets in int64", replace(4, lambda x: x.long()), TypeError, "k_offsets must be int32, got int64"),
    Bad("k_grouped_fp8_gemm_nt", "offsets with gaps", replace(4, lambda x: x.repeat(2)[::2]), ValueError, "k_offsets must be contiguous, got strides"),
    Bad("k_grouped_fp8_gemm_nt", "into float16", replace(5, lambda x: torch.float16), TypeError, "out_dtype must be bfloat16 or float32, got float16"),
]  # fmt: skip
