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
from tests.emulator.build import MISSING, fp8_gemm_tiles, tiles_for_groups
from tests.emulator.interface import CONTIGUOUS, MASKED, OFFSETS, Kernels
from tests.support import (
    BF16_LIMIT,
    FP32_LIMIT,
    Guarded,
    assert_gemm_close,
    assert_rounded_once,
    bits,
    dequantized_product,
    num_left_tiles,
    quantized_operands,
)

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

LIMITS = {torch.bfloat16: BF16_LIMIT, torch.float32: FP32_LIMIT}
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)

TILES = fp8_gemm_tiles()
PLANS = [
    (config, splits)
    for config, (kind, numbers) in enumerate(TILES)
    for splits in ((1, 2, 4, 8) if kind == "DSO_FP8_SWAP_AB" else (1, 2) if numbers[4:] == (2,) else (1,))
]


def tall(*numbers: int) -> int:
    """The config whose line begins so."""
    return next(i for i, (kind, x) in enumerate(TILES) if kind == "DSO_FP8_GEMM" and x[: len(numbers)] == numbers)


def swapped(*numbers: int) -> int:
    return next(i for i, (kind, x) in enumerate(TILES) if kind == "DSO_FP8_SWAP_AB" and x[: len(numbers)] == numbers)


MANY_ROWS = tall(3, 128)
"""The largest tile, which one warp loads where sfa is MN-major, and which CTAs may share."""


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
@pytest.mark.parametrize(
    "plan",
    [
        (tall(1, 64), 1),
        (tall(1, 64, 2), 1),
        (tall(1, 32), 1),
        (MANY_ROWS, 1),
        (swapped(16, 64), 1),
        (swapped(32, 64, 2), 2),
    ],
    ids=str,
)
def test_outputs_are_overwritten_or_added_to_in_both_types(plan, dtype, accumulate, kernels):
    operands = quantized_operands(70, 72, 272, "cpu")
    got = dense(kernels, operands, plan=plan, dtype=dtype, accumulate=accumulate)
    want = dequantized_product(*operands)
    if accumulate:
        want += 5
    assert_gemm_close(got, want, LIMITS[dtype])


@pytest.mark.parametrize(("num_sms", "seed"), [(1, 2), (2, 3), (4, 4), (8, 5)])
@pytest.mark.parametrize(
    "plan",
    [
        (tall(2, 64), 1),
        (tall(1, 64, 2), 1),
        (tall(1, 32), 1),
        (MANY_ROWS, 1),
        (swapped(8, 64, 2), 4),
        (swapped(64, 64), 1),
        (swapped(64, 64, 2), 2),
    ],
    ids=str,
)
def test_no_order_of_events_changes_a_bit(plan, num_sms, seed, kernels):
    operands = mn_major(quantized_operands(rows_of(plan[0]) + 8, 136, 528, "cpu"))
    want = dense(kernels, operands, plan=plan)
    kernels.use(num_sms, seed)
    assert torch.equal(bits(dense(kernels, operands, plan=plan)), bits(want))


@pytest.mark.parametrize(
    ("rows", "num_sms"), [*((500, sms) for sms in (2, 4, 5, 7, 8, 10, 13, 16)), (400, 3), (1600, 3), (1600, 5)]
)
def test_ctas_that_share_tiles_give_the_same_bits_in_every_order_of_events(rows, num_sms, kernels):
    """Of nine tiles all that make no full wave: one for all, parts within a tile, and parts of two. Of eight and of 26,
    two of which are wide: some of those, and others."""
    operands = mn_major(quantized_operands(rows, 264, 1168, "cpu"))
    plan = (MANY_ROWS, 1, num_left_tiles(rows, 264, num_sms))
    kernels.use(num_sms)
    first = dense(kernels, operands, plan=plan)
    assert_gemm_close(first, dequantized_product(*operands), BF16_LIMIT)
    for seed in range(1, 4):
        kernels.use(num_sms, seed)
        assert torch.equal(bits(dense(kernels, operands, plan=plan)), bits(first))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", LIMITS)
def test_shared_tiles_are_overwritten_or_added_to_in_both_types(dtype, accumulate, kernels):
    operands = mn_major(quantized_operands(200, 136, 656, "cpu"))
    kernels.use(num_sms=3)
    got = dense(kernels, operands, plan=(MANY_ROWS, 1, 1), dtype=dtype, accumulate=accumulate)
    want = dequantized_product(*operands) + (5 if accumulate else 0)
    assert_gemm_close(got, want, LIMITS[dtype])


@pytest.mark.parametrize("k", [64, 80, 160, 192, 208, 576])
def test_half_a_step_at_the_end_changes_no_bit(k, kernels):
    """Of the tall tiles, which leave out what is beyond k, and of the swapped ones, which multiply zeros."""
    operands = mn_major(quantized_operands(200, 136, k, "cpu"))
    want = dense(kernels, operands, plan=(swapped(64, 64), 1))
    for config in (MANY_ROWS, tall(2, 128), tall(1, 64)):
        assert torch.equal(bits(dense(kernels, operands, plan=(config, 1))), bits(want))


@pytest.mark.parametrize("num_sms", [3, 4])
def test_the_packages_own_choice_shares_tiles_and_is_right(num_sms, kernels):
    kernels.use(num_sms)
    operands = mn_major(quantized_operands(385, 264, 5008, "cpu"))
    assert_gemm_close(dense(kernels, operands), dequantized_product(*operands), BF16_LIMIT)


@pytest.mark.parametrize(
    ("m", "n", "num_sms"),
    [
        *((193, 8, 1), (256, 136, 1), (400, 264, 1), (400, 264, 3), (400, 264, 4)),
        *((1600, 392, 3), (1600, 392, 4), (1600, 392, 16)),
    ],
)
def test_a_low_last_block_of_rows_changes_no_bit(m, n, num_sms, kernels):
    """Its tiles are wide if there are two waves of others, but for the last of an odd number of columns. If so many
    make no full wave they are the last of all. 1,600 rows are a band of eight blocks, and a low one."""
    operands = mn_major(quantized_operands(m, n, 400 if m < 1000 else 144, "cpu"))
    want = dense(kernels, operands, plan=(tall(1, 64), 1))
    assert_gemm_close(want, dequantized_product(*operands), BF16_LIMIT)
    for seed in range(2):
        kernels.use(num_sms, seed)
        assert torch.equal(bits(dense(kernels, operands, plan=(MANY_ROWS, 1))), bits(want))


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
    num_stages = TILES[config][1][3]
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


TILES_FOR_GROUPS = tiles_for_groups()


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


@pytest.mark.parametrize("config", TILES_FOR_GROUPS, ids=TILES_FOR_GROUPS.get)
def test_tiles_that_ctas_draw_give_the_bits_of_a_fixed_order(config, kernels):
    """Every tile that groups can have, with groups that end at all places of it; what counted is closed again. Of 12
    SMs' 30 tiles of 32 x 128 the last six are halves."""
    m, counts = 200, (200, 0, 1, 130, 64)
    a, sfa, b, sfb = grouped_operands((len(counts), m), len(counts), k=144)
    got = []
    for num_sms, seed, counts_tiles in ((1, 0, True), (3, 1, True), (2, 2, False), (12, 3, True)):
        out = Guarded((len(counts), m, b.shape[1]), torch.bfloat16, "cpu")
        out.tensor.fill_(5)
        kernels.use(num_sms, seed)
        options = {"config": config, "counts_tiles": counts_tiles}
        left = kernels.m_grouped_fp8_gemm_nt((a, sfa, b, sfb), out.tensor, MASKED, int32(counts), **options)
        out.assert_intact()
        assert (left == 0) == counts_tiles
        got.append(out.tensor)
    for i, count in enumerate(counts):
        want = group_by_group((a[i], sfa[i], b[i : i + 1], sfb[i : i + 1]), [0] * count + [-1] * (m - count))
        assert_only_own_rows(got[0][i], want, [0] * count + [-1] * (m - count), torch.bfloat16)
    for other in got[1:]:
        assert torch.equal(bits(got[0]), bits(other))


@pytest.mark.parametrize("n", [72, 136, 264])
@pytest.mark.parametrize("num_sms", [1, 5])
def test_groups_that_end_low_make_wide_tiles_of_the_same_bits(num_sms, n, kernels):
    counts = (64, 1, 193, 256, 0, 257, 400)
    a, sfa, b, sfb = grouped_operands((len(counts), max(counts)), len(counts), n=n, k=272)
    got = []
    for seed, config in enumerate((tall(1, 64), MANY_ROWS)):
        out = Guarded((len(counts), max(counts), n), torch.bfloat16, "cpu")
        out.tensor.fill_(5)
        kernels.use(num_sms, seed)
        kernels.m_grouped_fp8_gemm_nt((a, sfa, b, sfb), out.tensor, MASKED, int32(counts), config=config)
        out.assert_intact()
        got.append(out.tensor)
    for i, count in enumerate(counts):
        want = dequantized_product(a[i], sfa[i], b[i], sfb[i])
        assert_only_own_rows(got[0][i], want, [0] * count + [-1] * (max(counts) - count), torch.bfloat16)
    assert torch.equal(bits(got[0]), bits(got[1]))


GUESSES = [
    pytest.param((3, 1, 8, 5, 32), id="right"),
    pytest.param((3, 0, 8, 5, 32), id="a group without rows"),
    pytest.param((3, 60, 8, 5, 32), id="a group of several blocks"),
    pytest.param((0, 0, 0, 2, 0), id="fewer tiles than guessed"),
    pytest.param((0, 0, 0, 0, 0), id="no tiles"),
]


@pytest.mark.parametrize("k", [144, 1680])
@pytest.mark.parametrize("num_sms", [2, 7, 16])
@pytest.mark.parametrize("counts", GUESSES)
def test_a_first_tile_that_was_guessed_changes_no_bit(counts, num_sms, k, kernels):
    """Constant weights are asked for before the counts are known. k: less than the ring holds, and more."""
    m, config = 64, swapped(32, 128)
    operands = grouped_operands((len(counts), m), len(counts), k=k)
    got = []
    for seed, b_is_constant in enumerate((False, True, True)):
        out = Guarded((len(counts), m, 136), torch.bfloat16, "cpu")
        out.tensor.fill_(5)
        kernels.use(num_sms, seed)
        options = {"config": config, "b_is_constant": b_is_constant}
        kernels.m_grouped_fp8_gemm_nt(operands, out.tensor, MASKED, int32(counts), **options)
        out.assert_intact()
        got.append(out.tensor)
    a, sfa, b, sfb = operands
    for i, count in enumerate(counts):
        want = group_by_group((a[i], sfa[i], b[i : i + 1], sfb[i : i + 1]), [0] * count + [-1] * (m - count))
        assert_only_own_rows(got[0][i], want, [0] * count + [-1] * (m - count), torch.bfloat16)
    assert torch.equal(bits(got[0]), bits(got[1]))
    assert torch.equal(bits(got[0]), bits(got[2]))


@pytest.mark.parametrize("expected_m", [4, 100], ids=["swapped", "tall"])
def test_a_run_of_segments_may_be_longer_than_a_warp_looks_at_once(expected_m, kernels):
    lengths = {0: 3, 2: 70, 1: 1, -1: 33, 3: 2}
    groups = [group for group, length in lengths.items() for _ in range(128 * length)][:-50]
    a, sfa, b, sfb = grouped_operands((len(groups),), 4, n=8, k=16)
    out = Guarded((len(groups), 8), torch.bfloat16, "cpu")
    out.tensor.fill_(5)
    kernels.m_grouped_fp8_gemm_nt((a, sfa, b, sfb), out.tensor, CONTIGUOUS, int32(groups), expected_m=expected_m)
    each = torch.stack([dequantized_product(a, sfa, b[i], sfb[i]) for i in range(4)])
    want = each[torch.tensor(groups).clamp(min=0), torch.arange(len(groups))]
    assert_only_own_rows(out.tensor, want, groups, torch.bfloat16)
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


# ------------------------------------------------------------------------------------------- K-grouped GEMMs

K_OFFSETS = [
    pytest.param((0, 128, 128, 1024), [(0, 128), (128, 128), (128, 1024)], id="one group empty"),
    pytest.param((130, 300, 1023), [(128, 256), (256, 896)], id="not multiples of 128"),
    pytest.param((512, -4, 256, INT_MAX), [(512, 512), (512, 512), (512, 1024)], id="out of order and out of bounds"),
    pytest.param((INT_MIN, INT_MIN), [(0, 0)], id="nothing"),
]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("offsets", "ranges"), K_OFFSETS)
@pytest.mark.parametrize(("m", "n"), [(1, 8), (70, 136), (200, 72)])
def test_each_k_group_sums_over_its_columns(m, n, offsets, ranges, dtype, accumulate, kernels):
    x, y = torch.randn(m, 1024).bfloat16(), torch.randn(n, 1024).bfloat16()
    a, sfa = deepseek_ops.per_token_cast_to_fp8(x)
    b, sfb = deepseek_ops.per_token_cast_to_fp8(y)
    start, first = torch.randn(len(ranges), m, n).to(dtype), None
    for seed, scales in enumerate([(sfa, sfb), tuple(to_mn_major_tma_aligned(sf) for sf in (sfa, sfb))]):
        out = Guarded((len(ranges), m, n), dtype, "cpu", strides=((m + 1) * (n + 8), n + 8, 1))
        out.tensor.copy_(start)
        kernels.use(num_sms=2 + seed, seed=seed)
        kernels.k_grouped_fp8_gemm_nt((a, scales[0], b, scales[1]), out.tensor, int32(offsets), accumulate=accumulate)
        out.assert_intact()
        first = out.tensor.clone() if first is None else first
        assert torch.equal(bits(out.tensor), bits(first))
    for i, (begin, end) in enumerate(ranges):
        columns = torch.arange(begin, end)
        want = (a.double() * sfa.double().repeat_interleave(128, 1))[:, columns] @ (
            b.double() * sfb.double().repeat_interleave(128, 1)
        )[:, columns].T
        assert_gemm_close(first[i], want + accumulate * start[i].double(), LIMITS[dtype])


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


@pytest.mark.parametrize("quantizes", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "d"), [(11, 4104), (19, 1096), (17, 1536), (21, 520), (16, 1024)])
def test_many_rows_without_an_addition_have_the_bits_of_few(m, d, dtype, quantizes, kernels):
    """On a GPU of one SM, where a CTA takes long rows in turn and a warp has a short one to itself, and on one that has
    an SM for each row."""
    shape = (1, m, d)
    x, weight = rows_with_gaps(shape, dtype), torch.randn(d).to(dtype)
    results = []
    for num_sms in (1, m):
        kernels.use(num_sms, seed=num_sms)
        y, q = Guarded(shape, dtype, "cpu"), Guarded(shape, torch.float8_e4m3fn, "cpu")
        sf = guarded_scales(*shape, True)
        if quantizes:
            kernels.rms_norm(x, weight, None, q=q.tensor, sf=sf.tensor)
        else:
            kernels.rms_norm(x, weight, y.tensor)
        written = [q, sf] if quantizes else [y]
        for output in written:
            output.assert_intact()
        results.append([bits(output.tensor) for output in written])
    assert all(map(torch.equal, *results))


# ---------------------------------------------------------------------------------------------- the rotation


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(3, 16, 64), (40, 1, 64), (5, 130, 64), (2, 3, 2), (3, 5, 20), (2, 2, 24), (1, 2, 4104)], ids=str
)
def test_the_rotation_is_the_references_bit_for_bit(shape, dtype, interleaved, kernels):
    """Of the last channels of each head, as a model has them; the largest shapes give a thread several heads."""
    t, heads, d = shape
    wide = torch.full((t, heads, d + 128), torch.nan, dtype=dtype)
    x = wide[..., 128:].copy_(torch.randn(shape))
    table = torch.full((50, d + 4), torch.nan)[:, :d].copy_(deepseek_ops.rope_cos_sin(50, d))
    for positions in (torch.randint(-5, 60, (t,)), torch.full((t,), INT_MAX, dtype=torch.int32)):
        y = Guarded(shape, dtype, "cpu")
        kernels.rope(x, positions, table, y.tensor, interleaved=interleaved)
        assert torch.equal(bits(y.tensor), bits(deepseek_ops.rope(x, positions, table, interleaved=interleaved)))
        y.assert_intact()


# --------------------------------------------------------------------------------- the latent cache of MLA

WILD = (-1, INT_MAX, INT_MIN, -(2**63), 2**62)


def tokens(t: int, rank: int, rope_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Slices of one projection, as a model has them, and positions inside and outside of the table."""
    both = torch.randn(t, rank + rope_dim).to(dtype)
    positions = torch.randint(-5, 60, (t,))
    positions[0] = INT_MAX
    return both[:, :rank], both[:, rank:], positions, deepseek_ops.rope_cos_sin(50, rope_dim)


def empty_cache(shape: tuple[int, ...], dtype: torch.dtype, *, gap: int = 1) -> Guarded:
    _, page_size, width = shape
    return Guarded(shape, dtype, "cpu", strides=(gap * page_size * width, width, 1))


def assert_written_alike(got: Guarded, want: Guarded) -> None:
    """The bits of every row, written or not."""
    assert torch.equal(bits(got.tensor), bits(want.tensor))
    got.assert_intact()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("cache", ["like", "fp8", "one scale"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_row_is_the_references_bit_for_bit_without_a_norm(dtype, cache, interleaved, kernels):
    """On four SMs 5 tokens have a CTA each, 70 a warp, and 600 share one in fours; some have no slot."""
    for t, gap, index in ((5, 1, torch.int32), (70, 2, torch.int64), (600, 2, torch.int64)):
        kv_c, k_pe, positions, cos_sin = tokens(t, 512, 64, dtype)
        slots = torch.randperm(640)[:t]
        slots[1:4] = torch.tensor(WILD[:3])
        if index == torch.int64:
            slots[-2:] = torch.tensor(WILD[3:])
        arguments = (kv_c, k_pe, positions.to(index), cos_sin, slots.to(index))
        shape = (64, 10, 656 if cache == "fp8" else 576)
        kind = {"like": dtype, "fp8": torch.uint8, "one scale": torch.float8_e4m3fn}[cache]
        options = {"interleaved": interleaved, "kv_scale": 0.003 if cache == "one scale" else 1.0}
        kv_c[0, 5], k_pe[0, 7] = torch.nan, torch.inf
        got, want = (empty_cache(shape, kind, gap=gap) for _ in range(2))
        kernels.mla_cache_write(*arguments, got.tensor, **options)
        deepseek_ops.mla_cache_write(*arguments, want.tensor, **options)
        assert_written_alike(got, want)


@pytest.mark.parametrize("wide_weight", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [5, 600])
def test_normed_latents_in_the_cache_are_those_of_the_norm(t, dtype, wide_weight, kernels):
    """Bit for bit those of the kernel of `rms_norm`, quantized in the FP8 format."""
    kv_c, k_pe, positions, cos_sin = tokens(t, 512, 64, dtype)
    weight = torch.randn(512).to(torch.float32 if wide_weight else dtype)
    slots = torch.randperm(640)[:t]
    normed = torch.empty(t, 512, dtype=dtype)
    kernels.rms_norm(kv_c[None], weight, normed[None], eps=1e-3)
    for kind, width, kv_scale in ((dtype, 576, 1.0), (torch.uint8, 656, 1.0), (torch.float8_e4m3fn, 576, 0.7)):
        got, want = (empty_cache((64, 10, width), kind) for _ in range(2))
        options = {"norm_weight": weight, "eps": 1e-3, "kv_scale": kv_scale}
        kernels.mla_cache_write(kv_c, k_pe, positions, cos_sin, slots, got.tensor, **options)
        deepseek_ops.mla_cache_write(normed, k_pe, positions, cos_sin, slots, want.tensor, kv_scale=kv_scale)
        assert_written_alike(got, want)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("extents", [(5, 2), (32, 16), (136, 24), (520, 64), (1100, 264), (1, 300)], ids=str)
def test_any_latents_and_keys_go_into_the_cache(extents, interleaved, kernels):
    rank, rope_dim = extents
    for dtype in (torch.bfloat16, torch.float32):
        arguments, slots = tokens(7, rank, rope_dim, dtype), torch.randperm(12)[:7]
        got, want = (empty_cache((4, 3, rank + rope_dim), dtype) for _ in range(2))
        kernels.mla_cache_write(*arguments, slots, got.tensor, interleaved=interleaved)
        apart = [x.contiguous() for x in arguments]
        deepseek_ops.mla_cache_write(*apart, slots, want.tensor, interleaved=interleaved)
        assert_written_alike(got, want)
        weight = torch.randn(rank)
        kernels.mla_cache_write(*arguments, slots, got.tensor, norm_weight=weight, interleaved=interleaved)
        wide = arguments[0].double()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
        assert_rounded_once(got.tensor.view(12, -1)[slots][:, :rank], wide)
        assert torch.equal(bits(got.tensor[..., rank:]), bits(want.tensor[..., rank:]))
        got.assert_intact()


def test_rows_of_the_fp8_cache_need_no_more_than_four_bytes_of_alignment(kernels):
    arguments, slots = tokens(5, 512, 64, torch.bfloat16), torch.randperm(12)[:5]
    got, want = (Guarded((4, 3, 656), torch.uint8, "cpu", strides=(3 * 660, 660, 1)) for _ in range(2))
    kernels.mla_cache_write(*arguments, slots, got.tensor)
    whole = torch.full((4, 3, 656), 255, dtype=torch.uint8)
    deepseek_ops.mla_cache_write(*arguments, slots, whole)
    want.tensor.copy_(whole)
    assert_written_alike(got, want)


def test_what_the_cache_write_cannot_take_is_refused_with_a_sentence(kernels):
    arguments, slots = tokens(2, 32, 16, torch.bfloat16), torch.arange(2)
    for shape, dtype, sentence in (
        ((2, 2, 656), torch.uint8, "the FP8 formats are for 512"),
        ((2**16, 2**15, 48), torch.bfloat16, "slots or more"),
    ):
        with pytest.raises(AssertionError, match=sentence):
            kernels.mla_cache_write(*arguments, slots, torch.empty(1, dtype=dtype).expand(shape))


def fp8_rows(num_pages: int, page_size: int) -> Tensor:
    """Written by the reference, but for one row of e4m3's extremes and of scales that are not finite."""
    cache = torch.zeros(num_pages, page_size, 656, dtype=torch.uint8)
    t = num_pages * page_size
    kv_c, k_pe, positions, cos_sin = tokens(t, 512, 64, torch.bfloat16)
    deepseek_ops.mla_cache_write(kv_c, k_pe, positions, cos_sin, torch.arange(t), cache)
    cache[0, 0, :512] = torch.arange(512) % 256
    cache[0, 0, 512:528] = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan]).view(torch.uint8)
    return cache


def one_scale_rows(num_pages: int, page_size: int) -> Tensor:
    """Any bytes at all."""
    return torch.randint(0, 256, (num_pages, page_size, 576), dtype=torch.uint8).view(torch.float8_e4m3fn)


def assert_gathered(kernels: Kernels, cache: Tensor, table: Tensor, cu_seqlens: Tensor, total: int) -> None:
    kv_scale = 0.3 if cache.dtype == torch.float8_e4m3fn else 1.0
    for dtype in DTYPES:
        want = deepseek_ops.mla_cache_gather(cache, table, cu_seqlens, total, out_dtype=dtype, kv_scale=kv_scale)
        out = Guarded(tuple(want.shape), dtype, "cpu")
        kernels.mla_cache_gather(cache, table, cu_seqlens, out.tensor, kv_scale)
        got_nan, want_nan = out.tensor.isnan(), want.isnan()
        assert torch.equal(got_nan, want_nan)
        assert torch.equal(bits(out.tensor.masked_fill(got_nan, 0)), bits(want.masked_fill(want_nan, 0)))
        out.assert_intact()


@pytest.mark.parametrize("dtype", [*DTYPES, "fp8", "one scale"])
@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_cached_tokens_are_gathered_bit_for_bit_as_the_reference_does(page_size, dtype, kernels):
    """Requests of unequal lengths, wild pages, tables that are too short, and rows that are nobody's."""
    lengths = [0, 17, 1, 0, 70, 33]
    max_pages = -(-60 // page_size)
    num_pages = 2 * max_pages
    table = torch.randint(0, num_pages, (len(lengths), max_pages + 3), dtype=torch.int32)[:, :max_pages]
    table[1, 0] = INT_MAX
    table[2] = -1
    table[5, -1] = num_pages
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    if dtype == "fp8":
        rows = fp8_rows(num_pages, page_size)
    elif dtype == "one scale":
        rows = one_scale_rows(num_pages, page_size)
    else:
        rows = torch.randn(num_pages, page_size, 48).to(dtype)
    cache = empty_cache(tuple(rows.shape), rows.dtype, gap=2).tensor
    cache.copy_(rows)
    assert_gathered(kernels, cache, table, cu_seqlens, sum(lengths) + 4)


@pytest.mark.parametrize("d", [1, 7, 20, 584, 4100])
def test_rows_of_any_width_are_gathered(d, kernels):
    cache = torch.randn(4, 3, d + (8 if d % 8 == 0 else 3))[:, :, :d]
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    assert_gathered(kernels, cache, table, int32((0, 6, 11)), 11)
    assert_gathered(kernels, cache.bfloat16()[:, ::2], table, int32((0, 4, 8)), 8)


@pytest.mark.parametrize("wild", [(3, 1, 9, 4, INT_MAX), (INT_MIN, 8, -3, 2, 5), (0, 0, 0, 0, 0), (50, 60, 70, 80, 90)])
def test_offsets_that_are_not_offsets_lead_nowhere_wild(wild, kernels):
    cache, table = torch.randn(5, 2, 16), torch.randint(0, 5, (4, 3), dtype=torch.int32)
    assert_gathered(kernels, cache, table, int32(wild), 12)


def test_many_requests_and_many_rows_are_gathered(kernels):
    """More offsets than a warp has lanes, and more rows of a CTA where there are enough for all SMs."""
    lengths = torch.randint(0, 30, (100,))
    total = int(lengths.sum())
    cache, table = torch.randn(9, 8, 16), torch.randint(0, 9, (100, 4), dtype=torch.int32)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths)).cumsum(0).int()
    for num_sms in (1, 4):
        kernels.use(num_sms=num_sms)
        assert_gathered(kernels, cache, table, offsets, total)
    assert_gathered(kernels, cache[:0], table, offsets, 5)
    assert_gathered(kernels, cache, table[:0], offsets[:1], 5)
    assert_gathered(kernels, cache, table[:, :0], offsets, 5)


# ------------------------------------------------------------------------------- merging attention states


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 9, 512), (2, 5, 128), (3, 7, 20), (1, 2, 4104), (2, 3, 0)], ids=str)
def test_states_are_merged_by_their_weights_and_an_empty_one_leaves_the_other_alone(shape, dtype, kernels):
    groups, m, _ = shape
    outs = [rows_with_gaps(shape, dtype) for _ in range(2)]
    lses = [torch.randn(groups, m) * 4 for _ in range(2)]
    lses[0][0, 0] = lses[1][-1, -1] = -torch.inf
    lses[0][0, 1] = lses[1][0, 1] = -torch.inf
    outs[0][0, 0] = outs[1][-1, -1] = torch.nan
    outs[0][0, 1] = outs[1][0, 1] = torch.nan
    out, lse = Guarded(shape, dtype, "cpu"), Guarded((groups, m), torch.float32, "cpu")
    kernels.merge_attn_states(outs[0], lses[0], outs[1], lses[1], out.tensor, lse.tensor)
    out.assert_intact()
    lse.assert_intact()

    want, want_lse = deepseek_ops.merge_attn_states(outs[0], lses[0], outs[1], lses[1])
    empty = lses[0].isneginf() | lses[1].isneginf()
    assert torch.equal(bits(out.tensor[empty]), bits(want[empty]))
    assert torch.equal(lse.tensor[empty], want_lse[empty])
    a, b = (lse_i[~empty].double() for lse_i in lses)
    total = torch.logaddexp(a, b)
    assert torch.allclose(lse.tensor[~empty].double(), total, rtol=2**-22, atol=2**-22)
    terms = [torch.exp(x - total)[:, None] * y[~empty].double() for x, y in zip((a, b), outs, strict=True)]
    assert_rounded_once(out.tensor[~empty], terms[0] + terms[1], 4 * (terms[0].abs() + terms[1].abs()))


# -------------------------------------------------------------------------------------- mixture of experts


def assert_gated(kernels: Kernels, logits: Tensor, bias: Tensor | None, num_topk: int, **options) -> None:
    t = logits.shape[0]
    weights, idx = Guarded((t, num_topk), torch.float32, "cpu"), Guarded((t, num_topk), torch.int32, "cpu")
    kernels.moe_gate(logits, bias, weights.tensor, idx.tensor, **options)
    want_weights, want_idx = deepseek_ops.moe_gate(logits, bias, num_topk=num_topk, **options)
    assert torch.equal(idx.tensor, want_idx)
    torch.testing.assert_close(weights.tensor, want_weights, rtol=2**-20, atol=1e-30, equal_nan=True)
    weights.assert_intact()
    idx.assert_intact()


GATES = [(256, 8, 4, 8), (160, 8, 3, 6), (64, 1, 1, 6), (7, 1, 1, 7), (12, 12, 5, 3), (1, 1, 1, 1), (384, 1, 1, 40)]
"""Experts, groups, kept groups, experts of a token."""


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_the_gate_chooses_as_the_reference_does(gate, scoring_func, with_bias, kernels):
    """Of random logits, of few different ones, which tie, and of those that are not finite; 40 tokens share CTAs."""
    num_experts, num_groups, num_topk_groups, num_topk = gate
    for t, normalizes in ((3, True), (40, False)):
        logits = torch.full((t, num_experts + 3), torch.nan)[:, :num_experts].copy_(torch.randn(t, num_experts) * 2)
        logits[1] = logits[1].round()
        logits[2] = torch.tensor([torch.inf, -torch.inf, 1.0, -200.0])[torch.randint(0, 4, (num_experts,))]
        if t > 3:
            logits[3] = torch.where(torch.rand(num_experts) < 0.1, torch.nan, logits[3])
            logits[4] = -torch.inf
        bias = torch.randint(-2, 3, (num_experts,)) / 4 if with_bias else None
        if with_bias and t > 3:
            bias[torch.rand(num_experts) < 0.3] = -torch.inf
        assert_gated(
            kernels,
            logits,
            bias,
            num_topk,
            num_groups=num_groups,
            num_topk_groups=num_topk_groups,
            scoring_func=scoring_func,
            norm_topk_prob=normalizes,
            routed_scaling_factor=2.5,
        )


def assert_mapped(kernels: Kernels, topk_idx: Tensor, num_experts: int, alignment: int) -> None:
    wants = deepseek_ops.moe_mapping(topk_idx, num_experts, alignment=alignment)
    gots = [Guarded(tuple(want.shape), torch.int32, "cpu") for want in wants]
    kernels.moe_mapping(topk_idx, *(got.tensor for got in gots), alignment=alignment)
    for got, want in zip(gots, wants, strict=True):
        assert torch.equal(got.tensor, want)
        got.assert_intact()


MAPPINGS = [(1, 8, 256), (0, 8, 16), (3, 0, 5), (7, 6, 64), (150, 8, 300), (40, 3, 1), (700, 8, 31), (17, 2, 4096)]
"""Tokens, experts of a token, experts; a cluster shares more than 4096 pairs."""


@pytest.mark.parametrize("alignment", [1, 8, 128])
@pytest.mark.parametrize("mapping", MAPPINGS, ids=str)
def test_pairs_are_ordered_by_expert_bit_for_bit_as_the_reference_does(mapping, alignment, kernels):
    t, num_topk, num_experts = mapping
    topk_idx = torch.randint(0, num_experts, (t, num_topk), dtype=torch.int32)
    assert_mapped(kernels, topk_idx, num_experts, alignment)
    wild = torch.randint(-1, num_experts + 2, (t, num_topk), dtype=torch.int32)
    wild[::3] = int32((INT_MIN, INT_MAX))[torch.randint(0, 2, wild[::3].shape)]
    assert_mapped(kernels, wild, num_experts, alignment)


@pytest.mark.parametrize("t", [513, 1030, 4100])
def test_a_cluster_orders_pairs_in_every_order_of_events(t, kernels):
    """Two, four and eight CTAs; few experts, so that all runs meet at each of them, or nearly none."""
    for seed, num_experts in enumerate((2, 9, 300)):
        kernels.use(seed=seed)
        topk_idx = torch.randint(0, num_experts, (t, 8), dtype=torch.int32)
        assert_mapped(kernels, topk_idx, num_experts, 1)
    kernels.use()
    assert_mapped(kernels, torch.full((t, 8), 5, dtype=torch.int32), 6, 64)
    assert_mapped(kernels, torch.full((t, 8), -1, dtype=torch.int32), 6, 64)


ELEMENTS = [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128]


@pytest.mark.parametrize("layout", ["rows", "gaps", "columns"])
@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("d", [1, 7, 96, 4112])
def test_rows_are_gathered_and_no_tokens_are_zeros(d, dtype, layout, kernels):
    t, rows = 5, 40 if d < 100 else 3
    x = torch.randint(0, 250, (d, t) if layout == "columns" else (t, d)).to(dtype)
    x = x.T if layout == "columns" else x if layout == "rows" else torch.cat((x, x[:, :3]), 1)[:, :d]
    token_idx = torch.randint(-1, t + 1, (rows,), dtype=torch.int32)
    token_idx[:3] = int32((INT_MIN, INT_MAX, 2))
    out = Guarded((rows, d), dtype, "cpu")
    kernels.moe_permute(x, token_idx, out.tensor)
    assert torch.equal(out.tensor, deepseek_ops.moe_permute(x, token_idx))
    out.assert_intact()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "num_topk", "d"), [(33, 8, 64), (3, 6, 2056), (5, 1, 20), (2, 0, 16), (4, 9, 7)])
def test_rows_are_added_up_bit_for_bit_as_the_reference_does(t, num_topk, d, dtype, kernels):
    rows = t * num_topk + 3
    y = rows_with_gaps((1, rows, d), dtype)[0]
    row_idx = torch.randint(-1, rows + 1, (t, num_topk), dtype=torch.int32)
    weights = torch.randn(t, num_topk)
    if num_topk:
        row_idx[0], row_idx[1, 0] = -1, INT_MAX
        weights[row_idx < 0] = torch.nan
    out = Guarded((t, d), dtype, "cpu")
    kernels.moe_unpermute(y, row_idx, weights, out.tensor)
    assert torch.equal(bits(out.tensor), bits(deepseek_ops.moe_unpermute(y, row_idx, weights)))
    out.assert_intact()
