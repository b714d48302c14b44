"""Calls of the dense GEMM."""

import torch

from tests.samples import Arguments, Bad
from tests.support import quantized_operands


def _fp8_gemm_nt(device: str) -> Arguments:
    return (*quantized_operands(5, 264, 272, device), torch.bfloat16)


def _fp8_gemm_nt_out(device: str) -> Arguments:
    return (*quantized_operands(5, 264, 272, device), torch.zeros(5, 264, device=device), True)


SAMPLES = {"fp8_gemm_nt": _fp8_gemm_nt, "fp8_gemm_nt_out": _fp8_gemm_nt_out}

BAD_INPUT = [
    Bad("fp8_gemm_nt", "a is no tensor", lambda a, *rest: (None, *rest), TypeError, "a must be a Tensor, got NoneType"),
    Bad("fp8_gemm_nt", "a of the wrong dtype", lambda a, *rest: (a.float(), *rest), TypeError, "a must be float8_e4m3fn, got float32"),
    Bad("fp8_gemm_nt", "a of the wrong rank", lambda a, *rest: (a[0], *rest), ValueError, r"a must be \[m, k\], got \[272\]"),
    Bad("fp8_gemm_nt", "k differs", lambda a, sfa, b, *rest: (a, sfa, b[:, :256], *rest), ValueError, r"b must be \[n, 272\], got \[264, 256\]"),
    Bad("fp8_gemm_nt", "sfa one row short", lambda a, sfa, *rest: (a, sfa[1:], *rest), ValueError, r"sfa must be \[5, 3\], got \[4, 3\]"),
    Bad("fp8_gemm_nt", "sfa one block short", lambda a, sfa, *rest: (a, sfa[:, 1:], *rest), ValueError, r"sfa must be \[5, 3\], got \[5, 2\]"),
    Bad("fp8_gemm_nt", "sfb one block short", lambda a, sfa, b, sfb, d: (a, sfa, b, sfb[1:], d), ValueError, r"sfb must be \[3, 3\], got \[2, 3\]"),
    Bad("fp8_gemm_nt", "sfb packed", lambda a, sfa, b, sfb, d: (a, sfa, b, sfb.int(), d), TypeError, "sfb must be float32, got int32"),
    Bad("fp8_gemm_nt", "n not a multiple of 8", lambda a, sfa, b, sfb, d: (a, sfa, b[:260], sfb, d), ValueError, "n must be a multiple of 8, got 260"),
    Bad("fp8_gemm_nt", "k not a multiple of 16", lambda a, sfa, b, sfb, d: (a[:, :264], sfa, b[:, :264], sfb, d), ValueError, "k must be a multiple of 16, got 264"),
    Bad("fp8_gemm_nt", "a transposed", lambda a, sfa, b, sfb, d: (a.repeat(2, 1)[:8].T.contiguous().T[:5], sfa, b, sfb, d), ValueError, "a must be contiguous in its last dimension, got strides"),
    Bad("fp8_gemm_nt", "out_dtype", lambda a, sfa, b, sfb, d: (a, sfa, b, sfb, torch.float64), TypeError, "out_dtype must be bfloat16 or float32, got float64"),
    Bad("fp8_gemm_nt_out", "out of the wrong shape", lambda a, sfa, b, sfb, out, acc: (a, sfa, b, sfb, out[1:], acc), ValueError, r"out must be \[5, 264\], got \[4, 264\]"),
    Bad("fp8_gemm_nt_out", "out of the wrong dtype", lambda a, sfa, b, sfb, out, acc: (a, sfa, b, sfb, out.half(), acc), TypeError, "out must be bfloat16 or float32, got float16"),
    Bad("fp8_gemm_nt_out", "out overlaps itself", lambda a, sfa, b, sfb, out, acc: (a, sfa, b, sfb, out[:1].expand(5, 264), acc), ValueError, "out must be free of internal overlap"),
    Bad("fp8_gemm_nt_out", "out overlaps an input", lambda a, sfa, b, sfb, out, acc: (out.view(torch.uint8).view(torch.float8_e4m3fn)[:, :272], sfa, b, sfb, out, acc), ValueError, "out must be apart from the inputs in memory"),
]  # fmt: skip
