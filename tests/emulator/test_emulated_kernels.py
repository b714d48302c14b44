"""The package's kernels on an emulated GPU: right, within bounds, and the same bits in every order of events.

The emulator lets threads and asynchronous copies happen in an order that a seed decides. A kernel that reads too early,
overwrites too soon or waits for what does not come shows here without a GPU, where it does so for one of the seeds.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import deepseek_ops
from deepseek_ops import to_mn_major_tma_aligned
from deepseek_ops.quantize import empty_sf
from tests.emulator.build import MISSING, fp8_gemm_tiles
from tests.emulator.interface import CONTIGUOUS, MASKED, OFFSETS, Kernels
from tests.support import (
    BF16_LIMIT,
    FP32_LIMIT,
    Guarded,
    assert_gemm_close,
    assert_rounded_once,
    bits,
    dequantized_product,
    quantized_operands,
)

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

LIMITS = {torch.bfloat16: BF16_LIMIT, torch.float32: FP32_LIMIT}
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)

TILES = fp8_gemm_tiles()
PLANS = [
    (config, splits)
    for config, (kind, _) in enumerate(TILES)
    for splits in ((1, 2, 4, 8) if kind == "DSO_FP8_SWAP_AB" else (1,))
]
MANY_ROWS = next(config for config, (kind, x) in enumerate(TILES) if kind == "DSO_FP8_GEMM" and x[:2] == (3, 128))
"""The tile for which there is a kernel of its own, where sfa is MN-major and d is bfloat16."""


def rows_of(config: int) -> int:
    kind, numbers = TILES[config]
    return 64 * numbers[0] if kind == "DSO_FP8_GEMM" else numbers[0]


def dense(kernels: Kernels, operands: tuple[Tensor, ...], *, dtype=torch.bfloat16, **options) -> Tensor:
    """d in a guarded tensor whose rows have gaps."""
    m, n = operands[0].shape[0], operands[2].shape[0]
    out = Guarded((m, n), dtype, "cpu", strides=(n + 8, 1))
    if options.get("accumulate"):
        out.tensor.fill_(5)
    kernels.fp8_gemm_nt(operands, out.tensor, **options)
    out.assert_intact()
    return out.tensor


def mn_major(operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    a, sfa, b, sfb = operands
    return a, to_mn_major_tma_aligned(sfa), b, sfb


# ---------------------------------------------------------------------------------------------- dense GEMMs


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_plan_is_right_with_scales_of_both_layouts(plan, kernels):
    config, splits = plan
    operands = quantized_operands(rows_of(config) + 5, 136, 400 if splits == 1 else 1040, "cpu")
    first = dense(kernels, operands, plan=plan)
    assert_gemm_close(first, dequantized_product(*operands), BF16_LIMIT)
    kernels.use(seed=1)
    assert torch.equal(bits(dense(kernels, mn_major(operands), plan=plan)), bits(first))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("plan", [(0, 1), (MANY_ROWS, 1), (6, 1), (9, 2)], ids=str)
def test_outputs_are_overwritten_or_added_to_in_both_types(plan, dtype, accumulate, kernels):
    operands = quantized_operands(70, 72, 272, "cpu")
    got = dense(kernels, operands, plan=plan, dtype=dtype, accumulate=accumulate)
    want = dequantized_product(*operands)
    if accumulate:
        want += 5
    assert_gemm_close(got, want, LIMITS[dtype])


@pytest.mark.parametrize(("num_sms", "seed"), [(1, 2), (2, 3), (4, 4), (8, 5)])
@pytest.mark.parametrize("plan", [(1, 1), (MANY_ROWS, 1), (5, 4), (10, 1)], ids=str)
def test_no_order_of_events_changes_a_bit(plan, num_sms, seed, kernels):
    operands = mn_major(quantized_operands(rows_of(plan[0]) + 8, 136, 528, "cpu"))
    want = dense(kernels, operands, plan=plan)
    kernels.use(num_sms, seed)
    assert torch.equal(bits(dense(kernels, operands, plan=plan)), bits(want))


@pytest.mark.parametrize("config", range(len(TILES)))
def test_ctas_compute_tile_after_tile(config, kernels):
    """Of few steps each: all that tiles share is used again before the slowest warp is through."""
    ctas_per_sm = 1 if TILES[config][0] == "DSO_FP8_GEMM" else TILES[config][1][-1]
    operands = mn_major(quantized_operands(4 * rows_of(config) - 3, 64 * ctas_per_sm + 8, 144, "cpu"))
    want = dequantized_product(*operands)
    for seed in range(4):
        kernels.use(num_sms=1, seed=seed)
        assert_gemm_close(dense(kernels, operands, plan=(config, 1)), want, BF16_LIMIT)


@pytest.mark.parametrize("config", range(len(TILES)))
def test_rings_go_round_more_than_twice(config, kernels):
    num_stages = TILES[config][1][2]
    operands = mn_major(quantized_operands(rows_of(config), 72, 128 * (2 * num_stages + 1) + 16, "cpu"))
    want = dequantized_product(*operands)
    for seed in range(4):
        kernels.use(seed=seed)
        assert_gemm_close(dense(kernels, operands, plan=(config, 1)), want, BF16_LIMIT)


@pytest.mark.parametrize("shape", [(1, 8, 16), (3, 200, 1040), (65, 64, 128), (130, 72, 256)], ids=str)
def test_the_packages_own_choice_is_right(shape, kernels):
    operands = quantized_operands(*shape, "cpu")
    assert_gemm_close(dense(kernels, operands), dequantized_product(*operands), BF16_LIMIT)


def test_the_sum_of_nothing_is_zero(kernels):
    a, b = (torch.empty(rows, 0, dtype=torch.float8_e4m3fn) for rows in (5, 8))
    operands = (a, torch.empty(5, 0), b, torch.empty(1, 0))
    assert (dense(kernels, operands) == 0).all()


# -------------------------------------------------------------------------------------------- grouped GEMMs


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def grouped_operands(shape: tuple[int, ...], g: int, n: int = 136, k: int = 272) -> tuple[Tensor, ...]:
    """`a` and `sfa` of `shape` rows, `b` and `sfb` of `g` groups."""
    x, w = torch.randn(*shape, k).bfloat16(), torch.randn(g, n, k).bfloat16()
    return *deepseek_ops.per_token_cast_to_fp8(x), *deepseek_ops.per_block_cast_to_fp8(w)


def group_by_group(operands: tuple[Tensor, ...], groups: list[int]) -> Tensor:
    """float64, with zeros in the rows whose group does not exist."""
    a, sfa, b, sfb = operands
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    for row, group in enumerate(groups):
        if 0 <= group < b.shape[0]:
            out[row] = dequantized_product(a[row : row + 1], sfa[row : row + 1], b[group], sfb[group])[0]
    return out


def assert_only_own_rows(got: Tensor, want: Tensor, groups: list[int], dtype: torch.dtype) -> None:
    """Rows of a group are close, and those of none still have what was there: 5."""
    owned = torch.tensor([group >= 0 for group in groups], dtype=torch.bool)
    assert_gemm_close(got[owned], want[owned], LIMITS[dtype])
    assert (got[~owned] == 5).all()


GROUPED = [
    pytest.param(OFFSETS, (0, 1, 1, 70, 75), [0] * 1 + [2] * 69 + [3] * 5, id="offsets, one group empty"),
    pytest.param(OFFSETS, (2, 7, 5, 80), [-1] * 2 + [0] * 5 + [2] * 68, id="offsets that decrease"),
    pytest.param(OFFSETS, (-3, 4, INT_MAX), [0] * 4 + [1] * 71, id="offsets out of bounds"),
    pytest.param(OFFSETS, (INT_MAX, 0, INT_MIN), [-1] * 75, id="offsets of nobody"),
    pytest.param(CONTIGUOUS, [1] * 128 + [-1] * 128 + [0] * 9, None, id="contiguous, a segment of nobody"),
    pytest.param(CONTIGUOUS, [INT_MAX, 2, INT_MIN] * 3, None, id="contiguous, wild indices"),
]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("expected_m", [4, 100], ids=["swapped", "tall"])
@pytest.mark.parametrize(("row_layout", "layout", "groups"), GROUPED)
def test_rows_meet_their_group_and_nobodys_stay(row_layout, layout, groups, expected_m, dtype, kernels):
    num_groups = 3 if row_layout == CONTIGUOUS else len(layout) - 1
    groups = groups or [x if 0 <= x < num_groups else -1 for x in layout]
    operands = grouped_operands((len(groups),), num_groups)
    want = group_by_group(operands, groups)
    for seed, (a, sfa, b, sfb) in enumerate([operands, mn_major(operands)]):
        out = Guarded((len(groups), b.shape[1]), dtype, "cpu")
        out.tensor.fill_(5)
        kernels.use(seed=seed)
        kernels.m_grouped_fp8_gemm_nt((a, sfa, b, sfb), out.tensor, row_layout, int32(layout), expected_m=expected_m)
        assert_only_own_rows(out.tensor, want, groups, dtype)
        out.assert_intact()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("expected_m", [4, 100], ids=["swapped", "tall"])
def test_masked_groups_have_as_many_rows_as_they_say(expected_m, dtype, kernels):
    m, counts = 70, (70, 0, 1, INT_MIN, 33, INT_MAX)
    a, sfa, b, sfb = grouped_operands((len(counts), m), len(counts), n=72)
    out = Guarded((len(counts), m, 72), dtype, "cpu")
    out.tensor.fill_(5)
    kernels.m_grouped_fp8_gemm_nt((a, sfa, b, sfb), out.tensor, MASKED, int32(counts), expected_m=expected_m)
    for i, count in enumerate(min(max(count, 0), m) for count in counts):
        groups = [0] * count + [-1] * (m - count)
        want = group_by_group((a[i], sfa[i], b[i : i + 1], sfb[i : i + 1]), groups)
        assert_only_own_rows(out.tensor[i], want, groups, dtype)
    out.assert_intact()


def test_nobodys_rows_can_be_cleared(kernels):
    operands = grouped_operands((20,), 2)
    out = Guarded((20, 136), torch.bfloat16, "cpu")
    kernels.m_grouped_fp8_gemm_nt(operands, out.tensor, OFFSETS, int32((3, 10, 15)), expected_m=8, clear_unowned=True)
    want = group_by_group(operands, [-1] * 3 + [0] * 7 + [1] * 5 + [-1] * 5)
    assert_gemm_close(out.tensor[3:15], want[3:15], BF16_LIMIT)
    assert (out.tensor[:3] == 0).all()
    assert (out.tensor[15:] == 0).all()
    out.assert_intact()


# -------------------------------------------------------------------- quantization, SwiGLU and the norm

ROWS = [(1, 3, 300), (2, 5, 136), (1, 33, 512), (1, 1, 7)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def rows_with_gaps(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    groups, m, k = shape
    x = torch.full((groups, m, k + 8), torch.nan, dtype=dtype)[..., :k]
    return x.copy_(torch.randn(shape))


def assert_quantized(q: Guarded, sf: Guarded, want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(bits(q.tensor), bits(want[0]))
    assert torch.equal(sf.tensor, want[1])
    q.assert_intact()
    sf.assert_intact()


def guarded_scales(groups: int, m: int, k: int, is_mn_major: bool) -> Guarded:
    shape = (groups, m, -(-k // 128))
    return Guarded(shape, torch.float32, "cpu", empty_sf(torch.empty(0), shape, is_mn_major).stride())


@pytest.mark.parametrize("is_mn_major", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_per_token_quantization_is_the_references_bit_for_bit(shape, dtype, is_mn_major, kernels):
    x = rows_with_gaps(shape, dtype)
    q, sf = Guarded(shape, torch.float8_e4m3fn, "cpu"), guarded_scales(*shape, is_mn_major)
    kernels.per_token_cast(x, q.tensor, sf.tensor)
    assert_quantized(q, sf, deepseek_ops.per_token_cast_to_fp8(x, mn_major=is_mn_major))


@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 130, 136), (2, 5, 300), (1, 1, 7)], ids=str)
def test_per_block_quantization_is_the_references_bit_for_bit(shape, dtype, use_ue8m0, kernels):
    x = rows_with_gaps(shape, dtype)
    q = Guarded(shape, torch.float8_e4m3fn, "cpu")
    sf = Guarded((shape[0], -(-shape[1] // 128), -(-shape[2] // 128)), torch.float32, "cpu")
    kernels.per_block_cast(x, q.tensor, sf.tensor, use_ue8m0=use_ue8m0)
    assert_quantized(q, sf, deepseek_ops.per_block_cast_to_fp8(x, use_ue8m0=use_ue8m0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_swiglu_is_rounded_once_and_its_quantized_form_agrees(shape, dtype, kernels):
    x = rows_with_gaps((*shape[:2], 2 * shape[2]), dtype)
    y = Guarded(shape, dtype, "cpu")
    kernels.silu_mul(x, y.tensor)
    gate, up = x.double().chunk(2, -1)
    assert_rounded_once(y.tensor, gate / (1 + torch.exp(-gate)) * up)
    y.assert_intact()
    q, sf = Guarded(shape, torch.float8_e4m3fn, "cpu"), guarded_scales(*shape, True)
    kernels.silu_mul(x, None, q.tensor, sf.tensor)
    assert_quantized(q, sf, deepseek_ops.per_token_cast_to_fp8(y.tensor.clone(), mn_major=True))


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*ROWS, (1, 2, 4104), (1, 40, 128)], ids=str)
def test_rms_norm_is_rounded_once_and_its_quantized_form_agrees(shape, dtype, adds, kernels):
    x, weight = rows_with_gaps(shape, dtype), torch.randn(shape[-1]).to(dtype)
    total, residual, added = x, None, None
    if adds:
        residual, added = rows_with_gaps(shape, dtype), Guarded(shape, dtype, "cpu")
        total = (x.float() + residual.float()).to(dtype)
    options = {"residual": residual, "residual_out": added.tensor if added else None}
    y = Guarded(shape, dtype, "cpu")
    kernels.rms_norm(x, weight, y.tensor, **options)
    wide = total.double()
    assert_rounded_once(y.tensor, wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double())
    y.assert_intact()
    if added:
        assert torch.equal(bits(added.tensor), bits(total))
        added.assert_intact()
    q, sf = Guarded(shape, torch.float8_e4m3fn, "cpu"), guarded_scales(*shape, True)
    kernels.rms_norm(x, weight, None, q=q.tensor, sf=sf.tensor, **options)
    assert_quantized(q, sf, deepseek_ops.per_token_cast_to_fp8(y.tensor.clone(), mn_major=True))
