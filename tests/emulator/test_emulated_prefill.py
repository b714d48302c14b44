"""MLA prefill on an emulated GPU: sequences of any lengths anywhere, and what must leave no trace."""

from __future__ import annotations

import math

import pytest
import torch

from tests.emulator.build import MISSING
from tests.support import Guarded, bits
from tests.test_mla import assert_attention_close, assert_same_bits, int32, prefill_case, prefill_truth

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

INT_MAX = 2**31 - 1
UNIT, PEAKY = 192**-0.5, 4 * 192**-0.5
"""Softmax scales that give 192 channels of N(0, 1) logits of standard deviation 1 and 4."""


@pytest.fixture(autouse=True)
def _same_operands():
    torch.manual_seed(0)


def prefill(kernels, case, scale=UNIT, *, causal=True):
    """Into guarded tensors."""
    q, k, v, cu_q, cu_k = case
    out = Guarded((*q.shape[:2], 128), q.dtype, "cpu")
    lse = Guarded(q.shape[:2], torch.float32, "cpu")
    kernels.mla_prefill((q, k, v, int32(cu_q, "cpu"), int32(cu_k, "cpu")), out.tensor, lse.tensor, scale, causal=causal)
    out.assert_intact()
    lse.assert_intact()
    return out.tensor, lse.tensor


def assert_attends(kernels, case, scale=UNIT, *, causal=True):
    assert_attention_close(prefill(kernels, case, scale, causal=causal), prefill_truth(*case, scale, causal))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_sequence_attends_to_its_own_keys(dtype, causal, kernels):
    case = prefill_case("cpu", (130, 0, 7, 64, 6, 1), (150, 4, 300, 0, 2, 1), h=2, dtype=dtype)
    for seed, scale in enumerate((UNIT, PEAKY)):
        kernels.use(num_sms=3, seed=seed)
        assert_attends(kernels, case, scale, causal=causal)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 257])
def test_lengths_around_the_tiles(length, kernels):
    assert_attends(kernels, prefill_case("cpu", (length, 3), (length, 3), h=1))


@pytest.mark.parametrize(("s_q", "s_k"), [(20, 390), (200, 260), (140, 128), (260, 100), (129, 1), (5, 0)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_last_query_sees_the_last_key(s_q, s_k, causal, kernels):
    assert_attends(kernels, prefill_case("cpu", (3, s_q), (5, s_k), h=1), causal=causal)


@pytest.mark.parametrize(("num_sms", "seed"), [(1, 1), (2, 2), (5, 3), (16, 4)])
def test_no_order_of_events_changes_a_bit(num_sms, seed, kernels):
    case = prefill_case("cpu", (300, 70, 9), (300, 200, 9), h=2)
    want = prefill(kernels, case)
    kernels.use(num_sms, seed)
    assert_same_bits(prefill(kernels, case), want)


def test_the_rings_go_round_many_times(kernels):
    case = prefill_case("cpu", (130,), (128 * 7 + 1,), h=1)
    for seed in range(3):
        kernels.use(num_sms=1, seed=seed)
        assert_attends(kernels, case)


def test_more_sequences_than_a_warp_has_lanes(kernels):
    lengths = [3 * (i % 3) for i in range(75)]
    kernels.use(num_sms=2)
    assert_attends(kernels, prefill_case("cpu", lengths, [i + 1 for i in lengths], h=2))


def test_a_sequence_gets_the_same_bits_alone(kernels):
    q, k, v, cu_q, cu_k = prefill_case("cpu", (40, 150, 7), (45, 170, 7), h=2)
    out, lse = prefill(kernels, (q, k, v, cu_q, cu_k))
    rows, keys = slice(cu_q[1], cu_q[2]), slice(cu_k[1], cu_k[2])
    alone = prefill(kernels, (q[rows], k[keys], v[keys], [0, 150], [0, 170]))
    assert_same_bits(alone, (out[rows], lse[rows]))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_neighbours_leave_no_trace(poison, kernels):
    lengths_q, lengths_k = (40, 150, 40), (40, 170, 40)
    clean = prefill_case("cpu", lengths_q, lengths_k, h=2)
    want = prefill(kernels, clean)
    q, k, v, cu_q, cu_k = clean
    mine, my_keys = slice(cu_q[1], cu_q[2]), slice(cu_k[1], cu_k[2])
    dirty = [torch.full_like(x, poison) for x in (q, k, v)]
    for x, whole, rows in zip(dirty, (q, k, v), (mine, my_keys, my_keys), strict=True):
        x[rows] = whole[rows]
    got = prefill(kernels, (*dirty, cu_q, cu_k))
    assert_same_bits((x[mine] for x in got), (x[mine] for x in want))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("key", [0, 63, 64, 100, 127, 128, 199])
def test_a_value_that_is_not_finite_is_felt_by_those_who_see_it_in_its_channel_alone(key, poison, kernels):
    case = prefill_case("cpu", (200,), (200,), h=2)
    want_out, want_lse = prefill(kernels, case)
    case[2][key, 1, 77] = poison
    out, lse = prefill(kernels, case)
    assert torch.equal(lse, want_lse)
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[key:, 1, 77] = True
    assert torch.equal(out.isnan(), hit)
    assert torch.equal(bits(out.masked_fill(hit, 0)), bits(want_out.masked_fill(hit, 0)))


@pytest.mark.parametrize("key", [5, 130])
def test_a_key_that_is_not_finite_is_felt_by_those_who_see_it_alone(key, kernels):
    case = prefill_case("cpu", (140,), (140,), h=1)
    want = prefill(kernels, case)
    case[1][key] = case[2][key] = math.nan
    got = prefill(kernels, case)
    assert_same_bits((x[:key] for x in got), (x[:key] for x in want))
    assert all(x[key:].isnan().all() for x in got)


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "ranges"),
    [
        ((-7, 130, INT_MAX), (-1, 4, INT_MAX), [(0, 130, 0, 4), (130, 150, 4, 140)]),
        ((20, 0, 50), (0, 4, 139), [(20, 50, 4, 139)]),
        ((0, 3, 150), (140, 4, 6), [(0, 3, 0, 0), (3, 150, 0, 0)]),
        ((INT_MAX, 0, -(2**31)), (0, 4, 9), []),
        ((70,), (1,), []),
    ],
)
def test_wild_offsets_stay_in_bounds(cu_q, cu_k, ranges, kernels):
    q, k, v, *_ = prefill_case("cpu", (150,), (140,))
    kernels.use(num_sms=3)
    out, lse = prefill(kernels, (q, k, v, cu_q, cu_k))
    want_out = torch.zeros(out.shape, dtype=torch.float64)
    want_lse, want_magnitude = torch.full_like(lse, -math.inf).double(), want_out.clone()
    for q_begin, q_end, k_begin, k_end in ranges:
        rows, keys = slice(q_begin, q_end), slice(k_begin, k_end)
        truth = prefill_truth(q[rows], k[keys], v[keys], (0, q_end - q_begin), (0, k_end - k_begin), UNIT)
        want_out[rows], want_lse[rows], want_magnitude[rows] = truth
    assert_attention_close((out, lse), (want_out, want_lse, want_magnitude))


def test_slices_of_wider_projections_give_the_same_bits(kernels):
    q, k, v, *cu = prefill_case("cpu", (130,), (140,))
    wide_q, kv = torch.randn(130, 2, 256).bfloat16(), torch.cat((k, v), -1)
    wide_q[..., 64:] = q
    got = prefill(kernels, (wide_q[..., 64:], kv[..., :192], kv[..., 192:], *cu))
    assert_same_bits(got, prefill(kernels, (q, k, v, *cu)))


def test_no_rows(kernels):
    out, lse = prefill(kernels, prefill_case("cpu", (0,), (3,)))
    assert out.numel() == lse.numel() == 0


def test_a_tiny_scale_leaves_the_mask_be(kernels):
    assert_attends(kernels, prefill_case("cpu", (70,), (70,), h=1), 1e-60)


def test_rows_that_are_not_aligned_are_refused(kernels):
    _, k, v, *cu = prefill_case("cpu", (5,), (5,))
    wide = torch.randn(5, 2, 200).bfloat16()
    with pytest.raises(AssertionError, match="multiples of 16 bytes"):
        prefill(kernels, (wide[..., 1:193], k, v, *cu))
