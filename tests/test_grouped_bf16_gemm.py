"""The grouped bfloat16 GEMM against float64 row by row, and what becomes of rows that are nobody's."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_ops import m_grouped_bf16_gemm_nt_offsets, m_grouped_bf16_gemm_nt_offsets_out
from deepseek_ops.registry import OPS
from tests.samples import SAMPLES
from tests.support import BF16_LIMIT, GPU, WILD_OFFSETS, Guarded, assert_gemm_close, bits

N, K = 136, 200
"""Edges in both: neither whole blocks of columns nor whole steps of depth."""

SIZES = [(1,), (8,), (0, 0), (0, 9, 0, 0, 17, 0), (0, 0, 3), (33, 0, 0), (1, 64, 65, 0, 130), (3,) * 70, ()]


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def operands(device, m, g, n=N, k=K):
    return torch.randn(m, k, device=device).bfloat16(), torch.randn(g, n, k, device=device).bfloat16()


def running(sizes):
    return [sum(sizes[:i]) for i in range(len(sizes) + 1)]


def owners(sizes):
    return [i for i, size in enumerate(sizes) for _ in range(size)]


def truth(a, b, groups):
    """float64, with zeros in the rows whose group does not exist."""
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64, device=a.device)
    for row, group in enumerate(groups):
        if 0 <= group < b.shape[0]:
            out[row] = b[group].double() @ a[row].double()
    return out


def assert_close(got, want):
    """Live rows by row and tile; the others are zeros exactly."""
    live = want.abs().sum(-1) > 0
    assert (got[~live] == 0).all()
    assert_gemm_close(got[live], want[live], BF16_LIMIT)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_offsets_give_each_group_its_rows(sizes, device):
    a, b = operands(device, sum(sizes), len(sizes))
    got = m_grouped_bf16_gemm_nt_offsets(a, b, int32(running(sizes), device))
    assert got.dtype == torch.bfloat16
    assert_close(got, truth(a, b, owners(sizes)))


@pytest.mark.parametrize(("offsets", "groups"), WILD_OFFSETS)
def test_wild_offsets_stay_in_bounds(offsets, groups, device):
    a, b = operands(device, 10, 2)
    nobodys = torch.tensor([group is None for group in groups], device=device)
    a[nobodys] = math.nan
    want = truth(a, b, [-1 if group is None else group for group in groups])
    assert_close(m_grouped_bf16_gemm_nt_offsets(a, b, int32(offsets, device)), want)

    out = Guarded((10, N), torch.bfloat16, device, strides=(N + 8, 1))
    out.tensor.fill_(5)
    m_grouped_bf16_gemm_nt_offsets_out(a, b, int32(offsets, device), out.tensor)
    assert (out.tensor[nobodys] == 5).all()
    assert_gemm_close(out.tensor[~nobodys], want[~nobodys], BF16_LIMIT)
    out.assert_intact()


@pytest.mark.parametrize("expert", [0, 31, 32, 255])
def test_all_tokens_may_go_to_one_of_many_experts(expert, device):
    a, b = operands(device, 700, 256, n=8, k=16)
    offsets = int32([0] * (expert + 1) + [700] * (256 - expert), device)
    got = m_grouped_bf16_gemm_nt_offsets(a, b, offsets)
    assert_gemm_close(got, a.double() @ b[expert].double().T, BF16_LIMIT)


def test_weights_of_experts_without_tokens_reach_nothing(device):
    a, b = operands(device, 12, 6)
    b[::2] = math.nan
    got = m_grouped_bf16_gemm_nt_offsets(a, b, int32([0, 0, 5, 5, 11, 11, 12], device))
    assert_close(got, truth(a, b, [1] * 5 + [3] * 6 + [5]))


def test_permuting_experts_permutes_bits(device):
    sizes = (5, 0, 130, 7)
    a, b = operands(device, sum(sizes), 4)
    begin = running(sizes)
    want = m_grouped_bf16_gemm_nt_offsets(a, b, int32(begin, device))
    order = [2, 3, 0, 1]
    rows = [row for i in order for row in range(begin[i], begin[i + 1])]
    offsets = int32(running([sizes[i] for i in order]), device)
    assert torch.equal(m_grouped_bf16_gemm_nt_offsets(a[rows], b[order], offsets), want[rows])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("others", [1, 7, 40, 200])
def test_a_rows_bits_do_not_depend_on_how_many_others_there_are(others):
    a, b = operands("cuda", 1 + others, 3, n=2816, k=2048)
    alone = m_grouped_bf16_gemm_nt_offsets(a[:1], b, int32([0, 0, 1, 1], "cuda"))
    together = m_grouped_bf16_gemm_nt_offsets(a, b, int32([0, 0, 1 + others, 1 + others], "cuda"))
    assert torch.equal(bits(together[:1]), bits(alone))


def test_layouts_of_operands_change_no_bit(device):
    a, b = operands(device, 70, 2)
    offsets = int32([0, 30, 70], device)
    want = m_grouped_bf16_gemm_nt_offsets(a, b, offsets)
    wide_a = torch.full((70, K + 24), math.nan, device=device).bfloat16()[:, 8 : K + 8].copy_(a)
    wide_b = torch.full((2, N + 1, K + 8), math.nan, device=device).bfloat16()[:, 1:, :K].copy_(b)
    out = Guarded((70, N), torch.bfloat16, device, strides=(N + 24, 1))
    m_grouped_bf16_gemm_nt_offsets_out(wide_a, wide_b, offsets, out.tensor)
    assert torch.equal(out.tensor, want)
    out.assert_intact()


@pytest.mark.parametrize(("n", "k"), [(0, 16), (8, 0), (8, 8), (64, 64), (576, 128)])
def test_small_and_empty_extents(n, k, device):
    a, b = operands(device, 9, 2, n=n, k=k)
    got = m_grouped_bf16_gemm_nt_offsets(a, b, int32([0, 4, 9], device))
    assert got.shape == (9, n)
    assert_gemm_close(got, truth(a, b, [0] * 4 + [1] * 5), BF16_LIMIT)


def test_small_integers_are_exact(device):
    a = torch.randint(-2, 3, (40, 256), device=device).bfloat16()
    b = torch.randint(-2, 3, (3, 16, 256), device=device).bfloat16()
    got = m_grouped_bf16_gemm_nt_offsets(a, b, int32([0, 11, 11, 40], device))
    assert torch.equal(got[:11], (a[:11].float() @ b[0].float().T).bfloat16())
    assert torch.equal(got[11:], (a[11:].float() @ b[2].float().T).bfloat16())


def test_infinities_and_nan_stay_in_their_row_and_column(device):
    a, b = operands(device, 6, 2)
    a[1, 3], b[1, 5, 7] = math.nan, math.inf
    got = m_grouped_bf16_gemm_nt_offsets(a, b, int32([0, 3, 6], device))
    assert got[1].isnan().all()
    assert (got[3:, 5].isinf() | got[3:, 5].isnan()).all()
    got[1] = got[3:, 5] = 0
    assert got.isfinite().all()


@pytest.mark.parametrize("op", [op for op in OPS if "_bf16_" in op])
def test_references_read_no_value_on_the_host(op):
    """Except on the CPU, where that is how they cost the owned rows only."""
    args = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in SAMPLES[op]("cpu")]
    OPS[op].reference(*args)  # meta tensors have no values to read


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("tokens", [1, 16, 64, 400])
def test_a_thousand_calls_give_the_same_bits(tokens):
    """At V2-Lite's size, experts chosen at random, with other work between the calls."""
    a, b = operands("cuda", 6 * tokens, 64, n=2816, k=2048)
    chosen = torch.rand(tokens, 64).argsort(-1)[:, :6].flatten().bincount(minlength=64)
    offsets = int32(running(chosen.tolist()), "cuda")
    want = m_grouped_bf16_gemm_nt_offsets(a, b, offsets)
    for i in range(64):
        rows = slice(*offsets[i : i + 2].tolist())
        assert_gemm_close(want[rows], a[rows].double() @ b[i].double().T, BF16_LIMIT)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    out = torch.empty_like(want)
    for _ in range(1000):
        out.fill_(torch.nan)
        m_grouped_bf16_gemm_nt_offsets_out(a, b, offsets, out)
        wrong += (bits(out) != bits(want)).sum()
    assert wrong == 0
