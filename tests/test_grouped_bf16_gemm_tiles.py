"""Every compiled tile of the grouped bfloat16 GEMM, also where the package would take another."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from deepseek_ops.library import library_path
from tests.emulator.build import bf16_gemm_tiles
from tests.emulator.interface import grouped_bf16_gemm_of
from tests.support import BF16_LIMIT, GPU, Guarded, assert_gemm_close, bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU")]

TILES = bf16_gemm_tiles()
"""Rows of a tile at most, its rows of b, stages."""


def run_tile(config: int, a: Tensor, b: Tensor, offsets: Tensor, out: Tensor) -> Tensor:
    """`config` is a line of csrc/launch/bf16_gemm_configs.def."""
    library = ctypes.CDLL(library_path("kernels"))
    library.dso_m_grouped_bf16_gemm_nt_by_plan.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    gemm = grouped_bf16_gemm_of(a, b, offsets, out, clear_unowned=False)
    stream = torch.cuda.current_stream().cuda_stream
    assert library.dso_m_grouped_bf16_gemm_nt_by_plan(ctypes.byref(gemm), config, stream) == 0
    return out


@pytest.mark.parametrize("k", [8, 72, 1408, 2048])
@pytest.mark.parametrize("config", range(len(TILES)), ids=lambda i: str(TILES[i]))
def test_every_tile_is_right_and_gives_the_same_bits(config, k):
    counts = [1, 0, 8, 9, 33, 0, 64, 130, 3]
    offsets = torch.tensor([0, *counts], device="cuda").cumsum(0).int()
    a, b = torch.randn(sum(counts), k, device="cuda").bfloat16(), torch.randn(9, 712, k, device="cuda").bfloat16()
    out = Guarded((sum(counts), 712), torch.bfloat16, "cuda", strides=(720, 1))
    got = run_tile(config, a, b, offsets, out.tensor).clone()
    out.assert_intact()
    for i in range(9):
        rows = slice(*offsets[i : i + 2].tolist())
        assert_gemm_close(got[rows], a[rows].double() @ b[i].double().T, BF16_LIMIT)
    assert torch.equal(bits(got), bits(run_tile(0, a, b, offsets, torch.empty_like(got))))
