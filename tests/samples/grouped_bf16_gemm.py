"""Calls of the grouped bfloat16 GEMM."""

from __future__ import annotations

import torch

from tests.samples import Arguments, Bad, replace


def _operands(device: str) -> Arguments:
    """75 rows, of which the first and the last are nobody's, and 4 groups of 136 x 200, of which one is empty."""
    a, b = torch.randn(75, 200, device=device).bfloat16(), torch.randn(4, 136, 200, device=device).bfloat16()
    return a, b, torch.tensor([1, 4, 4, 9, 74], dtype=torch.int32, device=device)


SAMPLES = {
    "m_grouped_bf16_gemm_nt_offsets": _operands,
    "m_grouped_bf16_gemm_nt_offsets_out": lambda device: (*_operands(device), torch.ones(75, 136, device=device).bfloat16()),
}  # fmt: skip

BAD_INPUT = [
    *(
        bad
        for op in SAMPLES
        for bad in (
            Bad(op, "a in float16", replace(0, lambda x: x.half()), TypeError, "a must be bfloat16, got float16"),
            Bad(op, "a of another width", replace(0, lambda x: x[:, :192]), ValueError, r"b must be \[g, n, 192\], got \[4, 136, 200\]"),
            Bad(op, "one weight for all", replace(1, lambda x: x[0]), ValueError, r"b must be \[g, n, 200\], got \[136, 200\]"),
            Bad(op, "b in float32", replace(1, lambda x: x.float()), TypeError, "b must be bfloat16, got float32"),
            Bad(op, "b transposed", replace(1, lambda x: x.mT.contiguous().mT), ValueError, "b must be contiguous in its last dimension"),
            Bad(op, "b of another group count", replace(1, lambda x: x[1:]), ValueError, r"offsets must be \[4\], got \[5\]"),
            Bad(op, "n not a multiple of 8", replace(1, lambda x: x[:, :132]), ValueError, "n must be a multiple of 8, got 132"),
            Bad(op, "k not a multiple of 8", lambda a, b, *rest: (a[:, :196], b[..., :196], *rest), ValueError, "k must be a multiple of 8, got 196"),
            Bad(op, "a not aligned", lambda a, b, *rest: (a[:, 4:196], b[..., :192], *rest), ValueError, "a must be aligned to 16 bytes"),
            Bad(op, "offsets in int64", replace(2, lambda x: x.long()), TypeError, "offsets must be int32, got int64"),
            Bad(op, "offsets one short", replace(2, lambda x: x[1:]), ValueError, r"offsets must be \[5\], got \[4\]"),
            Bad(op, "offsets with gaps", replace(2, lambda x: x.repeat(2)[::2]), ValueError, "offsets must be contiguous, got strides"),
        )
    ),
    Bad("m_grouped_bf16_gemm_nt_offsets_out", "out one short", replace(3, lambda x: x[1:]), ValueError, r"out must be \[75, 136\], got \[74, 136\]"),
    Bad("m_grouped_bf16_gemm_nt_offsets_out", "out in float32", replace(3, lambda x: x.float()), TypeError, "out must be bfloat16, got float32"),
    Bad("m_grouped_bf16_gemm_nt_offsets_out", "out transposed", replace(3, lambda x: x.mT.contiguous().mT), ValueError, "out must be contiguous in its last dimension"),
    Bad("m_grouped_bf16_gemm_nt_offsets_out", "out overlaps itself", replace(3, lambda x: x[:1].expand(x.shape)), ValueError, "out must be free of internal overlap"),
    Bad("m_grouped_bf16_gemm_nt_offsets_out", "out over b", lambda a, b, offsets, out: (a, b, offsets, b.flatten()[: out.numel()].view(out.shape)), ValueError, "out must be apart from the inputs in memory"),
]  # fmt: skip
