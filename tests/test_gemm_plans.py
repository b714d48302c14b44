"""Every compiled tile of the FP8 GEMM, and every split of k, at shapes that the planner would not give it."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

import deepseek_ops
from deepseek_ops import _native, fp8_gemm_nt, fp8_gemm_nt_out, to_mn_major_tma_aligned
from deepseek_ops.library import library_path
from tests.support import (
    BF16_LIMIT,
    GPU,
    assert_gemm_close,
    bits,
    dequantized_product,
    num_left_tiles,
    quantized_operands,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU")]

CONFIGS = _native.fp8_gemm_configs() if deepseek_ops.build_info["cuda"] else []
PLANS = [(x["config"], splits) for x in CONFIGS for splits in (1, 2, 4, 8) if splits <= x["most_splits"]]
SHAPES = [(1, 8, 1024), (7, 72, 1152), (17, 136, 2048), (65, 264, 1040), (130, 576, 1024), (321, 200, 1280)]


class Gemm(ctypes.Structure):
    """dso_fp8_gemm of csrc/launch/deepseek_kernels.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "sfa", "b", "sfb", "d")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "a_stride", "b_stride", "d_stride")),
        *((name, ctypes.c_int64) for name in ("sfa_stride_m", "sfa_stride_k", "sfb_stride_n", "sfb_stride_k")),
        *((name, ctypes.c_int) for name in ("d_dtype", "accumulate", "batch_invariant", "b_is_constant")),
        ("workspace", ctypes.c_void_p),
    ]


def sharing_workspace() -> Tensor:
    """What shared tiles need, of any content."""
    library = ctypes.CDLL(library_path("kernels"))
    library.dso_fp8_gemm_sharing_bytes.restype = ctypes.c_int64
    return torch.full((library.dso_fp8_gemm_sharing_bytes(num_sms()),), 90, dtype=torch.uint8, device="cuda")


def run_plan(
    plan: tuple[int, ...],
    a: Tensor,
    sfa: Tensor,
    b: Tensor,
    sfb: Tensor,
    out: Tensor,
    b_is_constant: bool = False,
    workspace: Tensor | None = None,
) -> Tensor:
    """`plan` is a config, a number of splits and, unless none, of shared tiles, which get a workspace of their own
    where none is given."""
    library = ctypes.CDLL(library_path("kernels"))
    library.dso_fp8_gemm_nt_by_plan.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 3, ctypes.c_void_p]
    config, splits, num_shared = (*plan, 0)[:3]
    if num_shared and workspace is None:
        workspace = sharing_workspace()
    pointers = (x.data_ptr() for x in (a, sfa, b, sfb, out))
    strides = (a.stride(0), b.stride(0), out.stride(0), *sfa.stride(), *sfb.stride())
    room = workspace.data_ptr() if workspace is not None else None
    gemm = Gemm(*pointers, *a.shape[:1], *b.shape, *strides, 0, 0, 0, b_is_constant, room)
    stream = torch.cuda.current_stream().cuda_stream
    assert library.dso_fp8_gemm_nt_by_plan(ctypes.byref(gemm), config, splits, num_shared, stream) == 0
    return out


def num_sms() -> int:
    return torch.cuda.get_device_properties("cuda").multi_processor_count


def by_plan(plan: tuple[int, ...], a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor) -> Tensor:
    poisoned = torch.full((a.shape[0], b.shape[0]), torch.nan, dtype=torch.bfloat16, device=a.device)
    return run_plan(plan, a, sfa, b, sfb, poisoned)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_plan_is_right_with_scales_of_both_layouts(plan, shape):
    a, sfa, b, sfb = quantized_operands(*shape, "cuda")
    want = dequantized_product(a, sfa, b, sfb)
    first = by_plan(plan, a, sfa, b, sfb)
    assert_gemm_close(first, want, BF16_LIMIT)
    assert torch.equal(bits(by_plan(plan, a, to_mn_major_tma_aligned(sfa), b, sfb)), bits(first))


@pytest.mark.parametrize(
    "plan", [plan for plan in PLANS if plan[1] > 1 or CONFIGS[plan[0]]["num_k_groups"] > 1], ids=str
)
def test_a_plan_gives_the_same_bits_every_time(plan):
    operands = quantized_operands(24, 576, 7168, "cuda")
    want = bits(by_plan(plan, *operands))
    for _ in range(100):
        assert torch.equal(bits(by_plan(plan, *operands)), want)


LARGEST = next((x["config"] for x in CONFIGS if (x["block_m"], x["block_n"]) == (192, 128)), 0)


@pytest.mark.parametrize(
    "shape", [(200, 136, 8464), (400, 1000, 2064), (2000, 2600, 1168), (4096, 4096, 1040)], ids=str
)
def test_shared_tiles_are_right_and_the_same_bits_every_time(shape):
    """Parts of a few steps and of many, of one tile and of two, and whole waves before them."""
    a, sfa, b, sfb = quantized_operands(*shape, "cuda")
    operands = a, to_mn_major_tma_aligned(sfa), b, sfb
    plan = (LARGEST, 1, num_left_tiles(*shape[:2], num_sms()))
    first = by_plan(plan, *operands)
    assert_gemm_close(first, dequantized_product(*operands), BF16_LIMIT)
    want = bits(first)
    for _ in range(100):
        assert torch.equal(bits(by_plan(plan, *operands)), want)


def test_an_op_shares_tiles_eagerly_and_in_a_graph_with_the_same_bits():
    a, sfa, b, sfb = quantized_operands(512, 7168, 16384, "cuda")
    operands = a, to_mn_major_tma_aligned(sfa), b, sfb
    assert _native.fp8_gemm_plan(512, 7168, 16384, num_sms=num_sms())["num_shared_tiles"] > 0
    want = bits(fp8_gemm_nt(*operands))
    rows = slice(None, None, 37)
    assert_gemm_close(fp8_gemm_nt(*operands)[rows], dequantized_product(a[rows], sfa[rows], b, sfb), BF16_LIMIT)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [fp8_gemm_nt(*operands) for _ in range(3)]
    for _ in range(20):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(bits(out), want) for out in outs)


@pytest.mark.parametrize(("n", "k"), [(2112, 7168), (576, 1536), (264, 272)])
def test_batch_invariant_rows_have_the_same_bits_in_any_company(n, k):
    a, sfa, b, sfb = quantized_operands(4096, n, k, "cuda")
    want = bits(fp8_gemm_nt(a, sfa, b, sfb, batch_invariant=True))
    for m in (1, 2, 16, 17, 33, 64, 65, 128, 129, 1000):
        rows = slice(500, 500 + m)
        got = fp8_gemm_nt(a[rows], sfa[rows], b, sfb, batch_invariant=True)
        assert torch.equal(bits(got), want[rows]), f"{m} rows"


def test_calls_with_a_constant_b_wait_for_all_else_that_they_use():
    """Each call adds to what the one before may still be computing."""
    generator = torch.Generator("cuda").manual_seed(0)
    for m in (1, 24, 64, 128):
        a, sfa, b, sfb = quantized_operands(m, 2112, 7168, "cuda")
        start = torch.randn(m, 2112, device="cuda", generator=generator)
        one_by_one, at_once = start.clone(), start.clone()
        for _ in range(50):
            fp8_gemm_nt_out(a, sfa, b, sfb, one_by_one, accumulate=True)
            torch.cuda.synchronize()
        for _ in range(50):
            fp8_gemm_nt_out(a, sfa, b, sfb, at_once, accumulate=True, b_is_constant=True)
        assert torch.equal(bits(at_once), bits(one_by_one)), f"{m} rows"
