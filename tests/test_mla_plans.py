"""Every way to share a request's keys, in both kernels of MLA decoding, also where the planner would take another."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from deepseek_ops.library import library_path
from tests.emulator.interface import MlaDecode, MlaDecodePlan, mla_decode_of, mla_workspace_bytes
from tests.support import GPU, Guarded
from tests.test_mla import UNIT, assert_attention_close, fp8_case, one_scale_case, random_case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU")]

LENGTHS = (0, 1, 63, 64, 65, 1500)


def run_plan(call: MlaDecode, plan: MlaDecodePlan) -> None:
    library = ctypes.CDLL(library_path("kernels"))
    library.dso_mla_decode_by_plan.argtypes = [ctypes.c_void_p] * 3
    stream = torch.cuda.current_stream().cuda_stream
    assert library.dso_mla_decode_by_plan(ctypes.addressof(call), ctypes.addressof(plan), stream) == 0


def by_plan(case, size: int, parts: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    """A cluster's CTAs, clusters that share the keys, and rows of a tile; in guarded tensors, whose rows have gaps."""
    b, s_q, h, _ = case.q.shape
    out = Guarded((b, s_q, h, 512), case.q.dtype, "cuda", strides=(s_q * h * 520, h * 520, 520, 1))
    lse = Guarded((b, s_q, h), torch.float32, "cuda")
    units = b * -(-s_q * h // tile_rows)
    num_bytes = mla_workspace_bytes(units, size, parts, tile_rows)
    workspace = torch.full((num_bytes,), 0xFF, dtype=torch.uint8, device="cuda")
    call = mla_decode_of(case.tensors(), out.tensor, lse.tensor, UNIT, True, None, False, case.kv_scale)
    call.workspace = workspace.data_ptr()
    run_plan(call, MlaDecodePlan(size, parts, 0, tile_rows, num_bytes))
    torch.cuda.synchronize()
    out.assert_intact()
    lse.assert_intact()
    return out.tensor, lse.tensor


@pytest.mark.parametrize("make_case", [random_case, fp8_case, one_scale_case])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("tile_rows", [16, 64])
def test_every_plan_is_attention_over_the_pages(tile_rows, size, parts, dtype, make_case):
    case = make_case("cuda", LENGTHS, 64, h=20, dtype=dtype, tile_rows=tile_rows)
    assert_attention_close(by_plan(case, size, parts, tile_rows), case.truth(UNIT))


@pytest.mark.parametrize("make_case", [random_case, fp8_case, one_scale_case])
@pytest.mark.parametrize("page_size", [1, 3, 8, 16, 48, 128])
@pytest.mark.parametrize("tile_rows", [16, 64])
def test_pages_of_any_size(tile_rows, page_size, make_case):
    case = make_case("cuda", LENGTHS, page_size, h=20, tile_rows=tile_rows)
    assert_attention_close(by_plan(case, 2, 2, tile_rows), case.truth(UNIT))
