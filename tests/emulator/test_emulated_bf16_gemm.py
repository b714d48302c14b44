"""The grouped bfloat16 GEMM on an emulated GPU: every tile, any offsets, and the same bits in every order of events."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.emulator.build import MISSING, bf16_gemm_tiles
from tests.emulator.interface import Kernels
from tests.support import BF16_LIMIT, INT_MAX, INT_MIN, Guarded, assert_gemm_close, bits

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

TILES = bf16_gemm_tiles()
"""Rows of a tile at most, its rows of b, stages."""


def operands(m: int, g: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Rows of both have gaps of NaN."""
    a, b = torch.full((m, k + 8), torch.nan).bfloat16(), torch.full((g, n, k + 16), torch.nan).bfloat16()
    return a[:, :k].copy_(torch.randn(m, k)), b[..., :k].copy_(torch.randn(g, n, k))


def truth(a: Tensor, b: Tensor, groups: list[int]) -> Tensor:
    """float64, with 5 in the rows of nobody."""
    return torch.stack(
        [b[i].double() @ x if i >= 0 else x.new_full(b.shape[1:2], 5) for i, x in zip(groups, a.double(), strict=True)]
    )


def run(kernels: Kernels, a: Tensor, b: Tensor, offsets: list[int], **options) -> Tensor:
    """d in a guarded tensor whose rows have gaps, of 5 where nothing is written."""
    n = b.shape[1]
    out = Guarded((a.shape[0], n), torch.bfloat16, "cpu", strides=(n + 8, 1))
    out.tensor.fill_(5)
    kernels.m_grouped_bf16_gemm_nt(a, b, torch.tensor(offsets, dtype=torch.int32), out.tensor, **options)
    out.assert_intact()
    return out.tensor


def assert_right(got: Tensor, a: Tensor, b: Tensor, groups: list[int]) -> None:
    want = truth(a, b, groups)
    owned = torch.tensor([i >= 0 for i in groups], dtype=torch.bool)
    assert_gemm_close(got[owned], want[owned], BF16_LIMIT)
    assert torch.equal(got[~owned].double(), want[~owned])


def spread(counts: list[int]) -> tuple[list[int], list[int]]:
    """Offsets, and the group of each row."""
    return torch.tensor([0, *counts]).cumsum(0).tolist(), [i for i, n in enumerate(counts) for _ in range(n)]


@pytest.mark.parametrize("config", range(len(TILES)), ids=lambda i: str(TILES[i]))
def test_every_tile_is_right_with_groups_of_any_size(config, kernels):
    """Both widths of a tile, one and several tiles a group, edges in n and k, and rings that go round."""
    rows, block_n, num_stages = TILES[config]
    offsets, groups = spread([1, 0, rows, rows // 2, rows + 1, 0, rows // 2 + 1])
    a, b = operands(len(groups), 7, block_n + 72, 64 * (num_stages + 2) + 8)
    first = run(kernels, a, b, offsets, config=config)
    assert_right(first, a, b, groups)
    kernels.use(num_sms=2, seed=1)
    assert torch.equal(bits(run(kernels, a, b, offsets, config=config)), bits(first))


@pytest.mark.parametrize("k", [8, 64, 72, 136])
@pytest.mark.parametrize("config", range(len(TILES)), ids=lambda i: str(TILES[i]))
def test_few_steps_of_many_tiles_are_right_in_every_order_of_events(config, k, kernels):
    offsets, groups = spread([3, TILES[config][0], 1, 9])
    a, b = operands(len(groups), 4, 200, k)
    want = run(kernels, a, b, offsets, config=config)
    assert_right(want, a, b, groups)
    for seed in range(1, 4):
        kernels.use(num_sms=1, seed=seed)
        assert torch.equal(bits(run(kernels, a, b, offsets, config=config)), bits(want))


def test_every_tile_gives_the_same_bits(kernels):
    """So a row's do not depend on how many others there are."""
    offsets, groups = spread([5, 0, 20, 1])
    a, b = operands(len(groups), 4, 136, 328)
    want = bits(run(kernels, a, b, offsets, config=0))
    for config in range(1, len(TILES)):
        assert torch.equal(bits(run(kernels, a, b, offsets, config=config)), want), TILES[config]
    alone = run(kernels, a[7:8], b[2:3], [0, 1])
    assert torch.equal(bits(alone), want[7:8])


WILD = [
    ((0, 1, 1, 70, 75), [0] * 1 + [2] * 69 + [3] * 5),
    ((2, 7, 5, 73), [-1] * 2 + [0] * 5 + [2] * 66 + [-1] * 2),
    ((-3, 4, INT_MAX), [0] * 4 + [1] * 71),
    ((INT_MAX, 0, INT_MIN), [-1] * 75),
    ((10, 3, 6), [-1] * 75),
    ((INT_MIN, INT_MIN), [-1] * 75),
    ((0, *([0] * 40), 3, *([3] * 30), 74), [40] * 3 + [71] * 71 + [-1]),
]


@pytest.mark.parametrize(("offsets", "groups"), WILD, ids=[str(offsets)[:32] for offsets, _ in WILD])
def test_wild_offsets_stay_in_bounds_and_nobodys_rows_stay_or_become_zeros(offsets, groups, kernels):
    a, b = operands(75, len(offsets) - 1, 136, 72)
    a[torch.tensor(groups) < 0] = torch.nan
    got = run(kernels, a, b, list(offsets))
    assert_right(got, a, b, groups)
    cleared = run(kernels, a, b, list(offsets), clear_unowned=True)
    nobodys = torch.tensor(groups) < 0
    assert (cleared[nobodys] == 0).all()
    assert torch.equal(bits(cleared[~nobodys]), bits(got[~nobodys]))


@pytest.mark.parametrize(("m", "g", "n", "k"), [(5, 2, 16, 0), (5, 0, 16, 64), (0, 2, 16, 64), (5, 2, 0, 64)], ids=str)
def test_sums_of_nothing_are_zeros_and_no_groups_own_no_rows(m, g, n, k, kernels):
    a, b = torch.randn(m, k).bfloat16(), torch.randn(g, n, k).bfloat16()
    offsets = [0, *([3] * g)]
    got, cleared = (run(kernels, a, b, offsets, clear_unowned=clears) for clears in (False, True))
    assert (got[3 if g else 0 :] == 5).all()
    assert (got[: 3 if g else 0] == 0).all()
    assert (cleared == 0).all()


def test_what_the_kernel_cannot_take_is_refused_with_a_sentence(kernels):
    a, b = operands(4, 2, 16, 64)
    for wrong, sentence in (
        ((a[:, :60], b[..., :60]), "k must be a multiple of 8"),
        ((a, b[:, :12]), "n must be a multiple of 8"),
        ((a[:, 1:57], b[..., :56]), "a must have aligned rows"),
        ((a[:, :56], b[..., 1:57]), "b must have aligned rows"),
    ):
        with pytest.raises(AssertionError, match=sentence):
            run(kernels, *wrong, [0, 1, 4])
    with pytest.raises(AssertionError, match="no such plan"):
        run(kernels, a, b, [0, 1, 4], config=len(TILES))
