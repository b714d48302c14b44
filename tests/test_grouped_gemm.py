"""The grouped GEMMs against float64 group by group, and what becomes of rows that are nobody's."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_ops import (
    k_grouped_fp8_gemm_nt,
    k_grouped_fp8_gemm_nt_out,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_contiguous_out,
    m_grouped_fp8_gemm_nt_masked,
    m_grouped_fp8_gemm_nt_masked_out,
    m_grouped_fp8_gemm_nt_offsets,
    m_grouped_fp8_gemm_nt_offsets_out,
    per_block_cast_to_fp8,
    per_token_cast_to_fp8,
    to_mn_major_tma_aligned,
)
from deepseek_ops.registry import OPS
from tests.samples import SAMPLES
from tests.support import (
    BF16_LIMIT,
    FP32_LIMIT,
    GPU,
    INT_MAX,
    INT_MIN,
    WILD_OFFSETS,
    Guarded,
    assert_gemm_close,
    assert_rows_close,
    bits,
    dequantized_product,
)

LIMITS = {torch.bfloat16: BF16_LIMIT, torch.float32: FP32_LIMIT}
N, K = 136, 272
"""Edges in both: two blocks of columns, three of depth, neither full."""

SIZES = [(128,), (0, 0), (0, 128, 0, 0, 256, 0), (0, 0, 128), (128, 0, 0), (1, 127, 130, 0, 65), (3,) * 31, ()]


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def operands(device, m, g, n=N, k=K):
    """`a, sfa, b, sfb` of random normal data."""
    x, w = torch.randn(m, k, device=device).bfloat16(), torch.randn(g, n, k, device=device).bfloat16()
    return *per_token_cast_to_fp8(x), *per_block_cast_to_fp8(w)


def running(sizes):
    return [sum(sizes[:i]) for i in range(len(sizes) + 1)]


def truth(a, sfa, b, sfb, groups):
    """float64, with zeros in the rows whose group does not exist."""
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64, device=a.device)
    for row, group in enumerate(groups):
        if 0 <= group < b.shape[0]:
            out[row] = dequantized_product(a[row : row + 1], sfa[row : row + 1], b[group], sfb[group])[0]
    return out


def assert_close(got, want, limit):
    """Live rows by row and tile; the others are zeros exactly."""
    live = want.abs().sum(-1) > 0
    assert (got[~live] == 0).all()
    assert_gemm_close(got[live], want[live], limit)


def poison(a, sfa, rows):
    """NaN data and NaN scales in `rows`."""
    a.view(torch.uint8)[rows] = 0x7F
    sfa[rows] = math.nan


# -------------------------------------------------------------------------------------------- offsets layout


@pytest.mark.parametrize("out_dtype", LIMITS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_offsets_give_each_group_its_rows(sizes, out_dtype, device):
    args = operands(device, sum(sizes), len(sizes))
    groups = [i for i, size in enumerate(sizes) for _ in range(size)]
    got = m_grouped_fp8_gemm_nt_offsets(*args, int32(running(sizes), device), out_dtype=out_dtype)
    assert got.dtype == out_dtype
    assert_close(got, truth(*args, groups), LIMITS[out_dtype])


@pytest.mark.parametrize(("offsets", "groups"), WILD_OFFSETS)
def test_wild_offsets_stay_in_bounds(offsets, groups, device):
    args = operands(device, 10, 2)
    groups = [-1 if group is None else group for group in groups]
    poison(*args[:2], [row for row, group in enumerate(groups) if group < 0])
    want = truth(*args, groups)
    got = m_grouped_fp8_gemm_nt_offsets(*args, int32(offsets, device))
    assert_close(got, want, BF16_LIMIT)

    out = Guarded((10, N), torch.float32, device, strides=(N + 8, 1))
    out.tensor.fill_(5)
    m_grouped_fp8_gemm_nt_offsets_out(*args, int32(offsets, device), out.tensor, accumulate=True)
    nobodys = int32(groups, device) < 0
    assert (out.tensor[nobodys] == 5).all()
    assert_close(out.tensor - 5, want, FP32_LIMIT)
    out.assert_intact()


@pytest.mark.parametrize("expert", [0, 128, 255])
def test_all_tokens_may_go_to_one_of_many_experts(expert, device):
    args = operands(device, 2000, 256, n=8, k=16)
    offsets = int32([0] * (expert + 1) + [2000] * (256 - expert), device)
    got = m_grouped_fp8_gemm_nt_offsets(*args, offsets, out_dtype=torch.float32)
    assert_gemm_close(got, dequantized_product(*args[:2], args[2][expert], args[3][expert]), FP32_LIMIT)


def test_permuting_experts_permutes_bits(device):
    sizes = (5, 0, 130, 7)
    a, sfa, b, sfb = operands(device, sum(sizes), 4)
    begin = running(sizes)
    want = m_grouped_fp8_gemm_nt_offsets(a, sfa, b, sfb, int32(begin, device))
    order = [2, 3, 0, 1]
    rows = [row for i in order for row in range(begin[i], begin[i + 1])]
    offsets = int32(running([sizes[i] for i in order]), device)
    got = m_grouped_fp8_gemm_nt_offsets(a[rows], sfa[rows], b[order], sfb[order], offsets)
    assert torch.equal(got, want[rows])


# ----------------------------------------------------------------------------------------- contiguous layout


@pytest.mark.parametrize("out_dtype", LIMITS)
@pytest.mark.parametrize("segments", [(0,), (2, -1, 0), (-1, 1, 1, -1), (-1, -1), (0, -1, 0, -1, 2), ()], ids=str)
def test_m_indices_name_the_group_of_each_segment(segments, out_dtype, device):
    groups = [group for group in segments for _ in range(128)]
    groups = groups[: max(0, len(groups) - 50)]  # a last segment that is short,
    groups[-3:] = [-1] * len(groups[-3:])  # and padded
    args = operands(device, len(groups), 3)
    padding = [row for row, group in enumerate(groups) if group < 0]
    want = truth(*args, groups)
    poison(*args[:2], padding)
    got = m_grouped_fp8_gemm_nt_contiguous(*args, int32(groups, device), out_dtype=out_dtype)
    assert_close(got, want, LIMITS[out_dtype])


@pytest.mark.parametrize("wild", [3, 10, -2, INT_MAX, INT_MIN])
def test_indices_of_no_group_are_padding(wild, device):
    groups = [0] * 128 + [wild] * 128 + [2] * 7
    args = operands(device, len(groups), 3)
    poison(*args[:2], range(128, 256))
    for accumulate in (False, True):
        out = Guarded((len(groups), N), torch.bfloat16, device)
        out.tensor.fill_(5)
        out.tensor[130, 3] = math.nan
        before = out.tensor.clone()
        m_grouped_fp8_gemm_nt_contiguous_out(*args, int32(groups, device), out.tensor, accumulate=accumulate)
        assert torch.equal(out.tensor[128:256].view(torch.int16), before[128:256].view(torch.int16))
        live = [*range(128), *range(256, 263)]
        want = truth(*args, groups)[live] + 5 * accumulate
        assert_gemm_close(out.tensor[live], want, BF16_LIMIT)
        out.assert_intact()


def test_padding_changes_no_bit_of_live_rows(device):
    args = operands(device, 256, 2)
    full = m_grouped_fp8_gemm_nt_contiguous(*args, int32([1] * 256, device))
    groups = [1] * 128 + [-1] * 128
    got = m_grouped_fp8_gemm_nt_contiguous(*args, int32(groups, device))
    assert_rows_close(got[:128], full[:128], 0.0 if device != "cpu" else 1e-6)


# --------------------------------------------------------------------------------------------- masked layout


def masked_operands(device, counts, max_m, n=N):
    g = len(counts)
    x, w = torch.randn(g, max_m, K, device=device).bfloat16(), torch.randn(g, n, K, device=device).bfloat16()
    return *per_token_cast_to_fp8(x), *per_block_cast_to_fp8(w), int32(counts, device)


@pytest.mark.parametrize("out_dtype", LIMITS)
@pytest.mark.parametrize("max_m", [1, 8, 63, 64, 65, 130])
def test_masked_m_counts_the_rows_of_each_group(max_m, out_dtype, device):
    counts = (max_m, 0, 1, max_m // 2, INT_MIN, -1, max_m + 1, INT_MAX)
    a, sfa, b, sfb, masked_m = masked_operands(device, counts, max_m)
    clamped = [min(max(count, 0), max_m) for count in counts]
    for i, count in enumerate(clamped):
        poison(a[i], sfa[i], slice(count, max_m))
    want = [truth(a[i], sfa[i], b, sfb, [i] * n + [-1] * (max_m - n)) for i, n in enumerate(clamped)]
    got = m_grouped_fp8_gemm_nt_masked(a, sfa, b, sfb, masked_m, out_dtype=out_dtype)
    for i in range(len(counts)):
        assert_close(got[i], want[i], LIMITS[out_dtype])

    out = Guarded(tuple(got.shape), out_dtype, device)
    out.tensor.fill_(math.nan)
    m_grouped_fp8_gemm_nt_masked_out(a, sfa, b, sfb, masked_m, out.tensor, expected_m=3)
    for i, count in enumerate(clamped):
        assert torch.equal(out.tensor[i, :count], got[i, :count])
        assert out.tensor[i, count:].isnan().all()
    out.assert_intact()


@pytest.mark.parametrize(("counts", "n"), [((3, 0, 40), N), ((20, 3, 17, 8, 24, 1), 4096)], ids=str)
def test_what_is_expected_changes_nothing(counts, n, device):
    """Of 192 tiles of few rows, 32 for each of six groups, the last 60 are halves on 132 SMs."""
    args = masked_operands(device, counts, 40, n=n)
    want = m_grouped_fp8_gemm_nt_masked(*args)
    for expected_m in (1, 14, 10**6):
        assert torch.equal(m_grouped_fp8_gemm_nt_masked(*args, expected_m=expected_m), want)


@pytest.mark.parametrize("n", [N, 4096])
@pytest.mark.parametrize("counts", [(20, 3, 17), (20, 0, 17), (0, 0, 0), (70, 1, 70)], ids=str)
def test_weights_that_are_constant_change_no_bit(counts, n, device):
    """They are read before it is known which groups have rows, and how many: (20, 3, 17) are as guessed."""
    args = masked_operands(device, counts, 70, n=n)
    want = m_grouped_fp8_gemm_nt_masked(*args, expected_m=16)
    for _ in range(20):
        assert torch.equal(m_grouped_fp8_gemm_nt_masked(*args, expected_m=16, b_is_constant=True), want)


@pytest.mark.parametrize("dtype", LIMITS)
def test_masked_rows_accumulate_in_float32(dtype, device):
    a, sfa, b, sfb, masked_m = masked_operands(device, (7, 0, 40), 40)
    out = torch.randn(3, 40, N, device=device).to(dtype)
    before = out.clone()
    m_grouped_fp8_gemm_nt_masked_out(a, sfa, b, sfb, masked_m, out, accumulate=True)
    d = m_grouped_fp8_gemm_nt_masked(a, sfa, b, sfb, masked_m, out_dtype=torch.float32)
    owned = torch.arange(40, device=device) < masked_m[:, None]
    assert torch.equal(out[owned], (before + d).to(dtype)[owned])
    assert torch.equal(out[~owned], before[~owned])


# ------------------------------------------------------------------------------------------------- any layout


def test_the_three_layouts_agree(device):
    sizes = (128, 0, 128)
    a, sfa, b, sfb = operands(device, 256, 3)
    by_offset = m_grouped_fp8_gemm_nt_offsets(a, sfa, b, sfb, int32(running(sizes), device))
    by_index = m_grouped_fp8_gemm_nt_contiguous(a, sfa, b, sfb, int32([0] * 128 + [2] * 128, device))
    slabs = [torch.stack((x[:128], x[:128], x[128:])) for x in (a, sfa)]
    masked = m_grouped_fp8_gemm_nt_masked(*slabs, b, sfb, int32(sizes, device))
    assert torch.equal(by_offset, by_index)
    assert torch.equal(by_offset, torch.cat((masked[0], masked[2])))
    assert (masked[1] == 0).all()


def test_layouts_of_operands_change_no_bit(device):
    a, sfa, b, sfb = operands(device, 70, 2)
    offsets = int32([0, 30, 70], device)
    want = m_grouped_fp8_gemm_nt_offsets(a, sfa, b, sfb, offsets)
    wide_a = torch.zeros(70, K + 32, device=device).to(a.dtype)
    wide_a[:, :K] = a
    wide_b = torch.zeros(2, N, K + 16, device=device).to(b.dtype)
    wide_b[..., :K] = b
    strided = wide_a[:, :K], to_mn_major_tma_aligned(sfa), wide_b[..., :K], sfb.mT.contiguous().mT
    assert torch.equal(m_grouped_fp8_gemm_nt_offsets(*strided, offsets), want)


@pytest.mark.parametrize(("n", "k"), [(0, 16), (8, 0), (8, 16), (576, 128)])
def test_small_and_empty_extents(n, k, device):
    args = operands(device, 9, 2, n=n, k=k)
    got = m_grouped_fp8_gemm_nt_offsets(*args, int32([0, 4, 9], device), out_dtype=torch.float32)
    want = truth(*args, [0] * 4 + [1] * 5)
    assert got.shape == (9, n)
    assert_gemm_close(got, want, FP32_LIMIT)


@pytest.mark.parametrize("op", [op for op in OPS if "_grouped_" in op])
def test_references_read_no_value_on_the_host(op):
    """Except on the CPU, where that is how they cost the owned rows only."""
    args = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in SAMPLES[op]("cpu")]
    OPS[op].reference(*args)  # meta tensors have no values to read


def test_small_integers_are_exact(device):
    a = torch.randint(-8, 9, (40, 256), device=device).float()
    b = torch.randint(-8, 9, (3, 16, 256), device=device).float()
    sfa, sfb = torch.full((40, 2), 0.5, device=device), torch.full((3, 1, 2), 2.0, device=device)
    offsets = int32([0, 11, 11, 40], device)
    args = a.to(torch.float8_e4m3fn), sfa, b.to(torch.float8_e4m3fn), sfb
    got = m_grouped_fp8_gemm_nt_offsets(*args, offsets, out_dtype=torch.float32)
    assert torch.equal(got[:11], a[:11] @ b[0].T)
    assert torch.equal(got[11:], a[11:] @ b[2].T)


# --------------------------------------------------------------------------------------------------- K groups


def k_operands(device, k_sum, m=72, n=N):
    x, y = torch.randn(m, k_sum, device=device).bfloat16(), torch.randn(n, k_sum, device=device).bfloat16()
    return *per_token_cast_to_fp8(x), *per_token_cast_to_fp8(y)


def k_truth(a, sfa, b, sfb, begin, end):
    columns = torch.arange(begin, max(begin, end), device=a.device)
    x, y = (q.double()[:, columns] * sf.double()[:, columns // 128] for q, sf in ((a, sfa), (b, sfb)))
    return x @ y.T


@pytest.mark.parametrize("out_dtype", LIMITS)
@pytest.mark.parametrize("sizes", [(128,), (0, 256, 0, 128), (128, 128, 384, 0), (0, 0), ()], ids=str)
def test_each_k_group_sums_over_its_columns(sizes, out_dtype, device):
    args, offsets = k_operands(device, sum(sizes)), running(sizes)
    got = k_grouped_fp8_gemm_nt(*args, int32(offsets, device), out_dtype=out_dtype)
    assert got.shape == (len(sizes), 72, N)
    assert got.dtype == out_dtype
    for i in range(len(sizes)):
        assert_gemm_close(got[i], k_truth(*args, offsets[i], offsets[i + 1]), LIMITS[out_dtype])


@pytest.mark.parametrize(
    ("offsets", "ranges"),
    [
        ((-5, 128, INT_MAX), [(0, 128), (128, 512)]),
        ((512, 128, 256), [(0, 0), (0, 0)]),
        ((130, 300, 512), [(128, 256), (256, 512)]),
        ((INT_MAX, INT_MIN, -1), [(0, 0), (0, 0)]),
    ],
)
def test_wild_k_offsets_stay_in_bounds(offsets, ranges, device):
    args = k_operands(device, 512)
    got = k_grouped_fp8_gemm_nt(*args, int32(offsets, device))
    for i, (begin, end) in enumerate(ranges):
        assert_gemm_close(got[i], k_truth(*args, begin, end), FP32_LIMIT)


def test_columns_of_other_groups_leave_no_trace(device):
    a, sfa, b, sfb = k_operands(device, 384)
    offsets = int32([0, 128, 384], device)
    want = k_grouped_fp8_gemm_nt(a, sfa, b, sfb, offsets)
    a.view(torch.uint8)[:, 128:] = 0x7F
    sfb[:, 1:] = math.nan
    got = k_grouped_fp8_gemm_nt(a, sfa, b, sfb, offsets)
    assert torch.equal(got[0], want[0])
    assert got[1].isnan().all()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_an_empty_k_group_is_zeros_or_untouched(accumulate, dtype, device):
    args, offsets = k_operands(device, 256), int32([0, 128, 128, 256], device)
    out = Guarded((3, 72, N), dtype, device, strides=(72 * (N + 8), N + 8, 1))
    out.tensor.fill_(-0.0)
    k_grouped_fp8_gemm_nt_out(*args, offsets, out.tensor, accumulate=accumulate)
    want = k_grouped_fp8_gemm_nt(*args, offsets, out_dtype=dtype)
    assert torch.equal(out.tensor, want)
    assert out.tensor[1].signbit().all() == accumulate
    out.assert_intact()


@pytest.mark.parametrize("dtype", LIMITS)
def test_k_groups_accumulate_in_float32(dtype, device):
    args, offsets = k_operands(device, 256), int32([0, 128, 256], device)
    out = torch.randn(2, 72, N, device=device).to(dtype)
    want = (out + k_grouped_fp8_gemm_nt(*args, offsets)).to(dtype)
    k_grouped_fp8_gemm_nt_out(*args, offsets, out, accumulate=True)
    assert torch.equal(out, want)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("m", "n"), [(1, 8), (64, 120), (193, 136), (400, 264)])
def test_k_groups_at_the_edges_of_tiles(m, n, dtype, accumulate, device):
    """Scales of both layouts give the same bits, and nothing outside the output is written."""
    sizes = (384, 0, 128, 1152)
    a, sfa, b, sfb = k_operands(device, sum(sizes), m, n)
    bounds, start = running(sizes), torch.randn(len(sizes), m, n, device=device).to(dtype)
    outs = []
    for scales in ((sfa, sfb), tuple(to_mn_major_tma_aligned(x) for x in (sfa, sfb))):
        out = Guarded((len(sizes), m, n), dtype, device, strides=((m + 1) * (n + 8), n + 8, 1))
        out.tensor.copy_(start)
        k_grouped_fp8_gemm_nt_out(a, scales[0], b, scales[1], int32(bounds, device), out.tensor, accumulate=accumulate)
        out.assert_intact()
        outs.append(out.tensor.clone())
    assert torch.equal(bits(outs[0]), bits(outs[1]))
    for i in range(len(sizes)):
        want = k_truth(a, sfa, b, sfb, bounds[i], bounds[i + 1]) + accumulate * start[i].double()
        assert_gemm_close(outs[0][i], want, LIMITS[dtype])


def test_hundreds_of_k_groups(device):
    sizes = [128 * (i * 7 % 4 == 0) for i in range(300)]
    args, bounds = k_operands(device, sum(sizes), 8, 16), running(sizes)
    got = k_grouped_fp8_gemm_nt(*args, int32(bounds, device))
    for i in (*range(9), 150, 298, 299):
        assert_gemm_close(got[i], k_truth(*args, bounds[i], bounds[i + 1]), FP32_LIMIT)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
def test_two_thousand_k_grouped_calls_give_the_same_bits():
    """Ragged groups of several tiles, overwritten and added up, with other work between the calls."""
    sizes = (1024, 128, 0, 2048, 640)
    args, offsets = k_operands("cuda", sum(sizes), 520, 712), int32(running(sizes), "cuda")
    want = k_grouped_fp8_gemm_nt(*args, offsets)
    for i in range(len(sizes)):
        assert_gemm_close(want[i], k_truth(*args, *running(sizes)[i : i + 2]), FP32_LIMIT)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    out = torch.empty_like(want)
    for call in range(2000):
        out.fill_(torch.nan)
        k_grouped_fp8_gemm_nt_out(*args, offsets, out)
        wrong += (bits(out) != bits(want)).sum()
        if call % 100 == 0:
            assert wrong == 0, f"call {call}"
    assert wrong == 0


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
def test_a_thousand_large_k_grouped_calls_give_the_same_bits():
    """Of so many steps that each SM's shared memory is busy all the time: a stage that is given back too early is
    written over while its last scales are read. Without the fence before, one call of 300 was wrong on one GPU, and
    none on another: tests/test_binary.py looks for the fence."""
    m, n, sizes = 4096, 7168, (8192,) * 4
    args = [
        x
        for rows in (m, n)
        for x in per_token_cast_to_fp8(torch.randn(rows, sum(sizes), device="cuda").bfloat16(), mn_major=True)
    ]
    offsets = int32(running(sizes), "cuda")
    want = k_grouped_fp8_gemm_nt(*args, offsets, out_dtype=torch.bfloat16)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    out = torch.empty_like(want)
    for _ in range(1000):
        k_grouped_fp8_gemm_nt_out(*args, offsets, out)
        wrong += (bits(out) != bits(want)).sum()
        out.fill_(torch.nan)
    assert wrong == 0
