"""Every tile of the FP8 GEMM that groups can have, also where the package would take another."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

import deepseek_ops
from deepseek_ops import to_mn_major_tma_aligned
from deepseek_ops.library import library_path
from tests.emulator.build import tiles_for_groups
from tests.emulator.interface import GroupedGemm, grouped_gemm_of
from tests.support import BF16_LIMIT, GPU, Guarded, assert_gemm_close, bits, dequantized_product

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU")]

TILES = tiles_for_groups()
MASKED = 1


def run_tile(config: int, call: GroupedGemm) -> None:
    """`config` is a line of csrc/launch/fp8_gemm_configs.def."""
    library = ctypes.CDLL(library_path("kernels"))
    library.dso_m_grouped_fp8_gemm_nt_by_plan.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    stream = torch.cuda.current_stream().cuda_stream
    assert library.dso_m_grouped_fp8_gemm_nt_by_plan(ctypes.byref(call), config, stream) == 0


def quantized_groups(groups: int, m: int, n: int, k: int) -> tuple[Tensor, ...]:
    x, w = torch.randn(groups, m, k, device="cuda").bfloat16(), torch.randn(groups, n, k, device="cuda").bfloat16()
    return *deepseek_ops.per_token_cast_to_fp8(x), *deepseek_ops.per_block_cast_to_fp8(w)


@pytest.mark.parametrize("mn_major", [False, True], ids=["row-major scales", "MN-major scales"])
@pytest.mark.parametrize("config", TILES, ids=TILES.get)
def test_every_tile_is_right_and_gives_the_same_bits_however_its_turn_comes(config, mn_major):
    """The 45 groups are more than a warp looks at once; with a workspace CTAs draw their tiles, without the order is
    fixed."""
    counts = ([400, 0, 1, 130, 64, 222, 193, 8, 17] * 5)[:45]
    a, sfa, b, sfb = quantized_groups(len(counts), 400, 1032, 656)
    operands = a, to_mn_major_tma_aligned(sfa) if mn_major else sfa, b, sfb
    layout = torch.tensor(counts, dtype=torch.int32, device="cuda")
    counter = torch.full((1,), 90, device="cuda")
    want = None
    for workspace in (None, *[counter] * 50):
        out = Guarded((len(counts), 400, 1032), torch.bfloat16, "cuda")
        out.tensor.fill_(5)
        call = grouped_gemm_of(operands, out.tensor, MASKED, layout, 1, False, False)
        call.gemm.workspace = workspace.data_ptr() if workspace is not None else None
        run_tile(config, call)
        out.assert_intact()
        got = bits(out.tensor)
        want = got if want is None else want
        assert torch.equal(got, want)
    assert int(counter) == 0
    for i, count in enumerate(counts):
        assert (out.tensor[i, count:] == 5).all()
        product = dequantized_product(a[i, :count], sfa[i, :count], b[i], sfb[i])
        assert_gemm_close(out.tensor[i, :count], product, BF16_LIMIT)
