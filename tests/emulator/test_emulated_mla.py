"""MLA decoding on an emulated GPU: every way to share the keys and to load them, and what must leave no trace."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.emulator.build import MISSING
from tests.support import Guarded, bits
from tests.test_mla import (
    FP8_POISON,
    GARBAGE,
    PEAKY,
    UNIT,
    assert_attention_close,
    assert_same_bits,
    fp8_case,
    int32,
    one_scale_case,
    random_case,
)

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

INT_MAX = 2**31 - 1
LENGTHS = (0, 1, 63, 64, 65, 200)
PLANS = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 3), (2, 2), (8, 2)]
"""CTAs of a cluster, and clusters that share the keys."""
TILE_ROWS = pytest.mark.parametrize("tile_rows", [16, 64])
"""Of the two kernels."""
MAKE_CASE = pytest.mark.parametrize("make_case", [random_case, fp8_case, one_scale_case])


def alone(case, request, q):
    """Of one request, what its truth follows from."""
    values = None if case.values is None else case.values[request : request + 1]
    return replace(case, q=q, keys=case.keys[request : request + 1], values=values)


def decode(kernels, case, scale=UNIT, **options):
    """In guarded tensors, whose rows have gaps."""
    *lead, s_q, h, _ = case.q.shape
    strides = (s_q * h * 520, h * 520, 520, 1)[-len(case.q.shape) :]
    out = Guarded((*lead, s_q, h, 512), case.q.dtype, "cpu", strides=strides)
    lse = Guarded((*lead, s_q, h), torch.float32, "cpu")
    kernels.mla_decode(case.tensors(), out.tensor, lse.tensor, scale, kv_scale=case.kv_scale, **options)
    out.assert_intact()
    lse.assert_intact()
    return out.tensor, lse.tensor


@MAKE_CASE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", PLANS, ids=str)
@TILE_ROWS
def test_every_plan_is_attention_over_the_pages(tile_rows, plan, dtype, make_case, kernels):
    case = make_case("cpu", LENGTHS, 64, h=16, dtype=dtype, tile_rows=tile_rows)
    for seed, scale in enumerate((UNIT, PEAKY)):
        kernels.use(num_sms=8, seed=seed)
        assert_attention_close(decode(kernels, case, scale, plan=plan, tile_rows=tile_rows), case.truth(scale))


@MAKE_CASE
@pytest.mark.parametrize("page_size", [1, 3, 8, 16, 24, 32, 64, 128])
@TILE_ROWS
def test_pages_of_any_size(tile_rows, page_size, make_case, kernels):
    case = make_case("cpu", LENGTHS, page_size, h=5, tile_rows=tile_rows)
    assert_attention_close(decode(kernels, case, tile_rows=tile_rows), case.truth())


@MAKE_CASE
@pytest.mark.parametrize("plan", [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("s_q", [1, 2])
@pytest.mark.parametrize("h", [1, 8, 16, 63, 64, 65, 128])
def test_any_number_of_heads_and_queries(h, s_q, plan, make_case, kernels):
    case = make_case("cpu", (1, 130), h=h, s_q=s_q)
    assert_attention_close(decode(kernels, case, plan=plan), case.truth())


@MAKE_CASE
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s_q", [3, 8])
def test_the_last_query_sees_the_last_key(s_q, causal, make_case, kernels):
    case = make_case("cpu", (0, s_q - 1, s_q, 66, 129), s_q=s_q, h=9)
    assert_attention_close(decode(kernels, case, causal=causal), case.truth(causal=causal))


@MAKE_CASE
@pytest.mark.parametrize(
    ("num_sms", "seed", "tile_rows"),
    [(1, 2, 64), (2, 3, 64), (5, 4, 64), (16, 5, 64), (16, 6, 64), (2, 3, 16), (16, 5, 16)],
)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_no_order_of_events_changes_a_bit(tile_rows, plan, num_sms, seed, make_case, kernels):
    case = make_case("cpu", (70, 450), 16, h=20)
    want = decode(kernels, case, plan=plan, tile_rows=tile_rows)
    kernels.use(num_sms, seed)
    assert_same_bits(decode(kernels, case, plan=plan, tile_rows=tile_rows), want)


@MAKE_CASE
@pytest.mark.parametrize("plan", [(1, 3, 1), (2, 3, 2), (2, 16, 16), (4, 2, 3)], ids=str)
def test_a_request_with_few_keys_has_fewer_parts(plan, make_case, kernels):
    case = make_case("cpu", (0, 1, 64, 65, 200, 450), 64, h=16)
    for seed in range(3):
        kernels.use(num_sms=8, seed=seed)
        assert_attention_close(decode(kernels, case, plan=plan), case.truth())


@MAKE_CASE
@pytest.mark.parametrize("h", [16, 80])
def test_batch_invariant_requests_have_the_same_bits_in_any_company(h, make_case, kernels):
    lengths = (1, 1024, 70, 1025, 2100)
    case = make_case("cpu", lengths, 64, h=h)
    want = decode(kernels, case, batch_invariant=True)
    for i in range(len(lengths)):
        alone = {x: getattr(case, x)[i : i + 1] for x in ("q", "block_table", "cache_seqlens")}
        alone["block_table"] = alone["block_table"][:, : max(1, -(-lengths[i] // 64))]
        kernels.use(num_sms=4, seed=i)
        got = decode(kernels, replace(case, **alone), batch_invariant=True)
        assert_same_bits(got, (x[i : i + 1] for x in want))


@MAKE_CASE
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("plan", [None, (1, 1), (2, 2), (8, 1), (2, 3, 2)], ids=str)
@pytest.mark.parametrize(("h", "tile_rows"), [(3, 16), (16, 16), (3, 64), (16, 64), (64, 64), (65, 64)])
def test_ragged_requests_are_as_if_they_were_alone(tile_rows, h, plan, causal, make_case, kernels):
    counts = (1, 0, 4, 2, 0, 7, 1)
    case = make_case("cpu", (9, 33, 65, 0, 130, 450, 64), h=h, tile_rows=tile_rows)
    rows = torch.randn(sum(counts) + 3, h, 576).to(case.q.dtype)
    offsets = [2 + sum(counts[:i]) for i in range(len(counts) + 1)]  # two rows before them all, and one after
    ragged = replace(case, q=rows)
    offsets_q = int32(offsets, "cpu")
    out, lse = decode(kernels, ragged, cu_seqlens_q=offsets_q, causal=causal, plan=plan, tile_rows=tile_rows)
    for i, (begin, end) in enumerate(pairwise(offsets)):
        one = alone(case, i, rows[None, begin:end])
        if end > begin:
            assert_attention_close((out[None, begin:end], lse[None, begin:end]), one.truth(causal=causal))
    for nobodys in (slice(0, 2), slice(offsets[-1], None)):
        assert (out[nobodys] == 0).all()
        assert lse[nobodys].isneginf().all()


@pytest.mark.parametrize("b", [31, 32, 33, 70])
def test_ragged_tiles_are_counted_over_many_requests(b, kernels):
    counts = [(7 * i) % 3 for i in range(b)]
    case = random_case("cpu", [(5 * i) % 9 for i in range(b)], 16, h=40)
    rows = torch.randn(sum(counts), 40, 576).bfloat16()
    offsets = [sum(counts[:i]) for i in range(b + 1)]
    out, lse = decode(kernels, replace(case, q=rows), cu_seqlens_q=int32(offsets, "cpu"))
    for i, (begin, end) in enumerate(pairwise(offsets)):
        one = alone(case, i, rows[None, begin:end])
        if end > begin:
            assert_attention_close((out[None, begin:end], lse[None, begin:end]), one.truth())


@MAKE_CASE
@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize(("h", "tile_rows"), [(64, 64), (16, 16)])
def test_the_ring_goes_round_many_times(h, tile_rows, page_size, make_case, kernels):
    case = make_case("cpu", (64 * 9 + 1,), page_size, h=h)
    for seed in range(6):
        kernels.use(seed=seed)
        assert_attention_close(decode(kernels, case, plan=(1, 1), tile_rows=tile_rows), case.truth())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_what_lies_past_the_length_leaves_no_trace(page_size, poison, kernels):
    clean, dirty = (random_case("cpu", LENGTHS, page_size, s_q=2, poison=x) for x in (0.0, poison))
    assert_same_bits(decode(kernels, dirty), decode(kernels, clean))


@pytest.mark.parametrize("make_case", [fp8_case, one_scale_case])
@pytest.mark.parametrize("poison", FP8_POISON)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_what_lies_past_the_length_of_an_fp8_cache_leaves_no_trace(page_size, poison, make_case, kernels):
    clean, dirty = (make_case("cpu", LENGTHS, page_size, s_q=2, poison=x) for x in (0, poison))
    assert_same_bits(decode(kernels, dirty), decode(kernels, clean))


def assert_felt_by_those_who_see_it(kernels, case, dirty, tile_rows, *, as_nan=True):
    """Of two requests of four queries: the last two of the first see what is poisoned in `dirty`."""
    out, lse = decode(kernels, dirty, tile_rows=tile_rows)
    want_out, want_lse = decode(kernels, case, tile_rows=tile_rows)
    assert torch.equal(bits(out[1]), bits(want_out[1]))
    assert torch.equal(bits(out[0, :2]), bits(want_out[0, :2]))
    assert torch.equal(bits(lse[0, :2]), bits(want_lse[0, :2]))
    if as_nan:
        assert out[0, 2:].isnan().all()
        assert lse[0, 2:].isnan().all()


@pytest.mark.parametrize("where", [slice(5, 6), slice(300, 301), slice(512, 516), slice(524, 528), slice(600, 602)])
@TILE_ROWS
def test_a_poisoned_fp8_key_is_felt_by_those_who_see_it_alone(tile_rows, where, kernels):
    case = fp8_case("cpu", (130, 130), 64, s_q=4, h=5)
    dirty = case.kv_cache.clone()
    dirty[case.block_table[0, 2], 0, where] = 0xFF  # of key 128, which queries 2 and 3 see
    assert_felt_by_those_who_see_it(kernels, case, replace(case, kv_cache=dirty), tile_rows)


@pytest.mark.parametrize("channel", [5, 300, 520, 575])
@TILE_ROWS
def test_a_poisoned_key_of_a_cache_of_one_scale_is_felt_by_those_who_see_it_alone(tile_rows, channel, kernels):
    case = one_scale_case("cpu", (130, 130), 64, s_q=4, h=5)
    dirty = case.kv_cache.view(torch.uint8).clone()
    dirty[case.block_table[0, 2], 0, channel] = 0x7F  # of key 128, which queries 2 and 3 see
    assert_felt_by_those_who_see_it(kernels, case, replace(case, kv_cache=dirty.view(torch.float8_e4m3fn)), tile_rows)


@pytest.mark.parametrize("kv_scale", [2.0**-20, 0.01, 1.0, 300.0])
def test_one_scale_of_any_magnitude(kv_scale, kernels):
    case = one_scale_case("cpu", (70, 300), h=16, kv_scale=kv_scale)
    for plan in ((1, 1), (2, 1), (2, 2)):
        assert_attention_close(decode(kernels, case, plan=plan), case.truth())


@pytest.mark.parametrize("magnitude", [1e-4, 1e-2, 30.0])
def test_fp8_keys_of_any_magnitude(magnitude, kernels):
    case = fp8_case("cpu", (70,), h=16, magnitude=magnitude)
    scale = UNIT / max(magnitude, 1.0)
    assert_attention_close(decode(kernels, case, scale), case.truth(scale))


def test_what_does_not_fit_float16_saturates(kernels):
    case = fp8_case("cpu", (70,), h=4)
    rows = case.kv_cache[case.block_table[0, 0]]
    rows[0, 512:516] = torch.tensor([1e30]).view(torch.uint8)
    rows[0, 600:602] = torch.tensor([1e30]).bfloat16().view(torch.uint8)
    case.kv_cache[case.block_table[0, 0]] = rows
    case.q[0, 0, 1, 3] = 1e30
    assert decode(kernels, case)[0].isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@TILE_ROWS
def test_a_poisoned_key_is_felt_by_those_who_see_it_alone(tile_rows, poison, kernels):
    case = random_case("cpu", (130, 130), 64, s_q=4, h=5)
    dirty = case.kv_cache.clone()
    dirty[case.block_table[0, 2], 0] = poison  # key 128, which queries 2 and 3 see
    assert_felt_by_those_who_see_it(kernels, case, replace(case, kv_cache=dirty), tile_rows, as_nan=math.isnan(poison))


@MAKE_CASE
@pytest.mark.parametrize("page", [-1, INT_MAX, -(2**31), "num_pages"])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_keys_of_a_page_that_does_not_exist_are_invisible(page_size, page, make_case, kernels):
    n = 64 // page_size
    case = make_case("cpu", (192, 192, page_size), page_size)
    table = case.block_table.clone()
    wild = case.kv_cache.shape[0] if page == "num_pages" else page
    table[1, n : 2 * n] = wild
    table[1, 0] = wild
    table[2, 0] = wild

    def visible(keys):
        return [keys[0], torch.cat((keys[1][page_size:64], keys[1][128:])), keys[2][:0]]

    seen = replace(case, keys=visible(case.keys), values=visible(case.values) if case.values else None)
    for plan in ((1, 1), (2, 1)):
        got = decode(kernels, replace(case, block_table=table), plan=plan)
        assert_attention_close(got, seen.truth())


@MAKE_CASE
def test_tables_hold_garbage_past_the_length_and_lengths_are_clamped(make_case, kernels):
    case = make_case("cpu", (128, 128), 16, s_q=3, spare_columns=0)
    want = decode(kernels, case)
    for length in (129, INT_MAX):
        assert_same_bits(decode(kernels, replace(case, cache_seqlens=int32([length, 128], "cpu"))), want)
    for length in (-1, -(2**31)):
        out, lse = decode(kernels, replace(case, cache_seqlens=int32([length, 128], "cpu")))
        assert (out[0] == 0).all()
        assert lse[0].isneginf().all()
    short = replace(case, cache_seqlens=int32([60, 128], "cpu"))
    want = decode(kernels, short)
    for entry in GARBAGE:
        table = case.block_table.clone()
        table[0, 4:] = entry
        assert_same_bits(decode(kernels, replace(short, block_table=table)), want)


@MAKE_CASE
@pytest.mark.parametrize("what", ["table", "pool"])
def test_empty_containers(what, make_case, kernels):
    case = make_case("cpu", (5, 6), s_q=2)
    case = (
        replace(case, block_table=case.block_table[:, :0])
        if what == "table"
        else replace(case, kv_cache=case.kv_cache[:0])
    )
    out, lse = decode(kernels, case)
    assert (out == 0).all()
    assert lse.isneginf().all()


def test_strided_queries_and_caches_give_the_same_bits(kernels):
    case = random_case("cpu", (70, 200), 64, s_q=2)
    wide_q = torch.randn(*case.q.shape[:-1], 640).bfloat16()
    wide_q[..., :576] = case.q
    layers = torch.randn(len(case.kv_cache), 3, 64, 576).bfloat16()
    layers[:, 1] = case.kv_cache
    strided = replace(case, q=wide_q[..., :576], kv_cache=layers[:, 1], block_table=case.block_table.repeat(1, 2))
    strided = replace(strided, block_table=strided.block_table[:, : case.block_table.shape[1]])
    assert_same_bits(decode(kernels, strided), decode(kernels, case))


def test_a_strided_fp8_cache_gives_the_same_bits(kernels):
    case = fp8_case("cpu", (70, 200), 64, s_q=2)
    layers = torch.full((len(case.kv_cache), 3, 64, 672), 0xFF, dtype=torch.uint8)
    layers[:, 1, :, 16:] = case.kv_cache
    strided = replace(case, kv_cache=layers[:, 1, :, 16:])
    assert_same_bits(decode(kernels, strided), decode(kernels, case))
