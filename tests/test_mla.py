"""MLA decoding, prefill and merging against float64 written request by request, and at their edges."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch

from deepseek_ops import (
    cast_to_fp8,
    merge_attn_states,
    mla,
    mla_cache_gather,
    mla_decode,
    mla_decode_out,
    mla_prefill,
    per_token_cast_to_fp8,
)
from deepseek_ops.registry import OPS
from tests.samples import SAMPLES
from tests.support import Guarded, bits, relative_error

LENGTHS = (0, 1, 2, 63, 64, 65, 127, 128, 129)
PAGE_SIZES = (1, 16, 64)
INT_MAX = 2**31 - 1
GARBAGE = (-1, INT_MAX, -(2**31))
UNIT, PEAKY = 1 / 24, 4 / 24
"""Softmax scales that give 576 channels of N(0, 1) logits of standard deviation 1 and 4."""
LIMITS = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def assert_same_bits(got, want):
    for x, y in zip(got, want, strict=True):
        assert torch.equal(bits(x), bits(y))


# ------------------------------------------------------------------------------------- truth and gates


def attention(q, k, v, scale):
    """float64 `out`, `lse` and `sum p |v|` of queries `[..., d]` over keys `[n, d]` that they all see."""
    q, k, v = q.double(), k.double(), v.double()
    if not len(k):
        zeros = q.new_zeros(*q.shape[:-1], v.shape[-1])
        return zeros, q.new_full(q.shape[:-1], -math.inf), zeros
    logits = scale * torch.einsum("...d,nd->...n", q, k)
    top = logits.max(-1, keepdim=True).values
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    return weights @ v / total, (top + total.log()).squeeze(-1), weights @ v.abs() / total


def assert_attention_close(got, truth):
    """By row of one query and head: relative error, each element, and the log-sum-exp; empty rows exactly."""
    (out, lse), (want_out, want_lse, magnitude) = got, truth
    limit = LIMITS[out.dtype]
    assert out.shape == want_out.shape
    assert lse.shape == want_lse.shape
    assert lse.dtype == torch.float32
    empty = want_lse.isneginf()
    assert torch.equal(lse.isneginf(), empty)
    assert (out[empty] == 0).all()
    if empty.all():
        return
    out, lse, want_out, want_lse = (x[~empty].double() for x in (out, lse, want_out, want_lse))
    errors = relative_error(out, want_out, -1)
    assert errors.max() <= limit, f"row {errors.argmax()}: {errors.max():.2e} > {limit:.0e}"
    # bfloat16 rounds by up to 2^-8, and twice: the probabilities and the result.
    bound = 2.0**-8 * (want_out.abs() + magnitude[~empty]) * limit / LIMITS[torch.bfloat16]
    bound = bound + 2.0**-23 * want_out.abs().amax(-1, keepdim=True)  # float16's smallest probabilities
    assert ((out - want_out).abs() <= bound).all()
    assert ((lse - want_lse).abs() <= 1e-5 + 2.0**-20 * want_lse.abs()).all()


def assert_attention_close_to_one(got, truths):
    """Of the kernels there are, which round an FP8 cache differently: a call's extents choose."""
    *others, last = truths
    for truth in others:
        try:
            return assert_attention_close(got, truth)
        except AssertionError:
            pass
    return assert_attention_close(got, last)


# --------------------------------------------------------------------------------------------- a paged case


@dataclass(frozen=True)
class Paged:
    """A decoding call. What no key of any request lives in is poisoned: page tails and unlisted pages with NaN, unused
    entries of the table with garbage."""

    q: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    keys: list[torch.Tensor]
    """The keys of each request."""
    kv_scale: float = 1.0
    values: list[torch.Tensor] | None = None
    """Those of the second product, where a kernel rounds them otherwise than the keys."""

    def tensors(self):
        return self.q, self.kv_cache, self.block_table, self.cache_seqlens

    def decode(self, scale=UNIT, **options):
        return mla_decode(*self.tensors(), softmax_scale=scale, kv_scale=self.kv_scale, **options)

    def truth(self, scale=UNIT, *, causal=True, head_dim_v=512):
        per_request = []
        for q, keys, values in zip(self.q, self.keys, self.values or self.keys, strict=True):
            s_q = len(q)
            ends = [len(keys) - s_q + i + 1 if causal else len(keys) for i in range(s_q)]
            rows = [
                attention(q[i], keys[: max(0, n)], values[: max(0, n), :head_dim_v], scale) for i, n in enumerate(ends)
            ]
            per_request.append([torch.stack(x) for x in zip(*rows, strict=True)])
        return tuple(torch.stack(x) for x in zip(*per_request, strict=True))


def paged(keys, q, page_size, *, rows=None, poison=math.nan, spare_pages=2, spare_columns=1):
    """Spreads each request's keys over pages in random order: `rows`, where the cache holds them in another format."""
    device, (width, dtype) = q.device, (q.shape[-1], q.dtype) if rows is None else (rows[0].shape[-1], rows[0].dtype)
    rows = keys if rows is None else rows
    counts = [-(-len(k) // page_size) for k in keys]
    num_pages = sum(counts) + spare_pages
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(len(keys))).tolist()
    kv_cache = torch.full((num_pages, page_size, width), poison, dtype=dtype, device=device)
    table = [[GARBAGE[i % 3] for i in range(max(counts, default=0) + spare_columns)] for _ in keys]
    for row, k in zip(table, rows, strict=True):
        for i in range(-(-len(k) // page_size)):
            row[i] = order.pop()
            chunk = k[i * page_size : (i + 1) * page_size]
            kv_cache[row[i], : len(chunk)] = chunk
    seqlens = int32([len(k) for k in keys], device)
    return Paged(
        q, kv_cache, int32(table, device).view(len(keys), max(counts, default=0) + spare_columns), seqlens, keys
    )


def random_case(
    device, lengths=LENGTHS, page_size=16, *, s_q=1, h=3, width=576, dtype=torch.bfloat16, tile_rows=None, **options
):
    generator = torch.Generator().manual_seed(page_size * 100 + s_q)
    keys = [torch.randn(n, width, generator=generator).to(device, dtype) for n in lengths]
    q = torch.randn(len(lengths), s_q, h, width, generator=generator).to(device, dtype)
    return paged(keys, q, page_size, **options)


FP8_POISON = (0x7F, 0xFF)
"""Both are NaN in e4m3; four of the second are NaN in float32, and two in bfloat16, too."""


FEW_ROWS, MANY_ROWS = TILE_ROWS = (16, 64)
"""(query, head) pairs of a request that make a tile, of the two kernels there are."""


def as_a_kernel_reads(rows, tile_rows):
    """`[n, 656]` bytes of an FP8 cache as a kernel multiplies them, keys and values: in float16, scales rounded to its
    11 bits; but for few rows the scores are those of the very values that the formula has."""
    latents, sf, rotated = (x.contiguous() for x in rows.split([512, 16, 128], -1))
    latents, sf, rotated = latents.view(torch.float8_e4m3fn), sf.view(torch.float32), rotated.view(torch.bfloat16)
    scales = (sf * 256).half().float() / 256
    rounded = (latents.float() * scales.repeat_interleave(128, -1)).half()
    values = torch.cat((rounded, rotated.half()), -1).double()
    exact = torch.cat((latents.double() * sf.double().repeat_interleave(128, -1), rotated.double()), -1)
    return exact if tile_rows == FEW_ROWS else values, values


def tile_rows_of(s_q, h):
    return FEW_ROWS if s_q * h <= FEW_ROWS else MANY_ROWS


def possible_tile_rows(s_q, h):
    """Of an FP8 cache: few rows always take the kernel for few, more take either (tests/host/mla_decode_plan.cpp)."""
    return (FEW_ROWS,) if s_q * h <= FEW_ROWS else TILE_ROWS


def fp8_case(
    device,
    lengths=LENGTHS,
    page_size=16,
    *,
    s_q=1,
    h=3,
    dtype=torch.bfloat16,
    magnitude=1.0,
    poison=0xFF,
    tile_rows=None,
    **options,
):
    """A cache in the FP8 format; keys and values are those that the kernel reads."""
    generator = torch.Generator().manual_seed(page_size * 100 + s_q)
    latents = torch.randn(sum(lengths), 512, generator=generator).to(device) * magnitude
    rotated = torch.randn(sum(lengths), 64, generator=generator).to(device, torch.bfloat16)
    q8, sf = per_token_cast_to_fp8(latents)
    rows = torch.cat([x.view(torch.uint8) for x in (q8, sf, rotated)], -1)
    q = torch.randn(len(lengths), s_q, h, 576, generator=generator).to(device, dtype)
    keys, values = as_a_kernel_reads(rows, tile_rows or tile_rows_of(s_q, h))
    case = paged(list(keys.split(lengths)), q, page_size, rows=rows.split(lengths), poison=poison, **options)
    return replace(case, values=list(values.split(lengths)))


def one_scale_case(
    device,
    lengths=LENGTHS,
    page_size=16,
    *,
    s_q=1,
    h=3,
    dtype=torch.bfloat16,
    kv_scale=0.3,
    poison=0xFF,
    tile_rows=None,
    **options,
):
    """A cache of e4m3 values with one scale for all."""
    generator = torch.Generator().manual_seed(page_size * 100 + s_q)
    values = torch.randn(sum(lengths), 576, generator=generator).to(device)
    rows = cast_to_fp8(values / kv_scale)
    q = torch.randn(len(lengths), s_q, h, 576, generator=generator).to(device, dtype)
    keys = [x.double() * kv_scale for x in rows.split(lengths)]
    case = paged(keys, q, page_size, rows=rows.view(torch.uint8).split(lengths), poison=poison, **options)
    return replace(case, kv_cache=case.kv_cache.view(torch.float8_e4m3fn), kv_scale=kv_scale)


def name_keys(keys):
    """Writes each key's index into its first three channels, as base-256 digits: exact in every dtype."""
    index = torch.arange(len(keys), device=keys.device)
    for digit in range(3):
        keys[:, digit] = (index // 256**digit % 256).to(keys.dtype)
    return keys


def named_key(out):
    """The index of the key that attention returned."""
    digits = out[..., :3].double().round().long()
    return digits[..., 0] + 256 * digits[..., 1] + 65536 * digits[..., 2]


# ------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("scale", [UNIT, PEAKY], ids=["unit", "peaky"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("dtype", LIMITS)
def test_decoding_is_attention_over_the_pages(dtype, page_size, scale, device):
    case = random_case(device, page_size=page_size, dtype=dtype)
    assert_attention_close(case.decode(scale), case.truth(scale))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s_q", range(1, 9))
def test_the_last_query_sees_the_last_key(s_q, causal, device):
    lengths = sorted({0, 1, s_q - 1, s_q, s_q + 1, 3 * s_q, 70})
    case = random_case(device, lengths, s_q=s_q)
    assert_attention_close(case.decode(causal=causal), case.truth(causal=causal))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_needle_in_the_last_key_is_found_and_one_behind_it_is_not(page_size, device):
    q = torch.randn(len(LENGTHS), 1, 2, 576, device=device).bfloat16()
    q[:, :, 1] = q[:, :, 0]
    q[..., :3] = 0
    keys = [name_keys(torch.randn(n + 1, 576, device=device).bfloat16()) for n in LENGTHS]
    for query, key in zip(q, keys, strict=True):
        key[-2:, 3:] = query[0, 0, 3:]  # the last visible key, and the first invisible one
    case = paged(keys, q, page_size)
    out, _ = replace(case, cache_seqlens=case.cache_seqlens - 1).decode(0.08)
    want = torch.tensor([max(0, n - 1) for n in LENGTHS], device=device)
    assert torch.equal(named_key(out), want[:, None, None].expand(-1, 1, 2))


@pytest.mark.parametrize("length", [3, 8, 9, 130])
def test_each_query_of_a_request_finds_its_own_last_key(length, device):
    s_q = 8
    u = torch.randn(576, device=device)
    u[:3] = 0
    keys = name_keys(u * (1 + torch.arange(length, device=device)[:, None] / 4))  # later keys win by far
    case = paged([keys], u.expand(1, s_q, 2, 576).contiguous(), 16)
    out, lse = case.decode(0.2)
    last = length - s_q + torch.arange(s_q, device=device)
    assert torch.equal(named_key(out)[0, :, 0], last.clamp(min=0))
    assert torch.equal(lse[0, :, 0].isneginf(), last < 0)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_lies_past_the_length_leaves_no_trace(poison, device):
    clean, dirty = (random_case(device, s_q=2, poison=x) for x in (0.0, poison))
    assert_same_bits(dirty.decode(), clean.decode())


def test_entries_past_the_length_are_ignored(device):
    case = random_case(device)
    used = -(-case.cache_seqlens // 16)
    unused = torch.arange(case.block_table.shape[1], device=device) >= used[:, None]
    want = case.decode()
    for entry in (*GARBAGE, 0, 10**6):
        table = torch.where(unused, entry, case.block_table).int()
        assert_same_bits(replace(case, block_table=table).decode(), want)


@pytest.mark.parametrize("page", [-1, INT_MAX, -(2**31), "num_pages"])
def test_keys_of_a_page_that_does_not_exist_are_invisible(page, device):
    case = random_case(device, (60, 60, 16), page_size=16)
    table = case.block_table.clone()
    table[1, 2] = table[2, 0] = case.kv_cache.shape[0] if page == "num_pages" else page
    keys = [case.keys[0], torch.cat((case.keys[1][:32], case.keys[1][48:])), case.keys[2][:0]]
    got = replace(case, block_table=table).decode()
    assert_attention_close(got, replace(case, keys=keys).truth())
    assert_same_bits((x[0] for x in got), (x[0] for x in case.decode()))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "means"), [(-1, 0), (-(2**31), 0), (65, 64), (INT_MAX, 64)])
def test_lengths_are_clamped_to_what_the_table_holds(length, means, causal, device):
    case = random_case(device, (64, 64), page_size=16, s_q=3, spare_columns=0)
    got = replace(case, cache_seqlens=int32([length, 64], device)).decode(causal=causal)
    want = replace(case, cache_seqlens=int32([means, 64], device)).decode(causal=causal)
    assert_same_bits(got, want)


def test_where_pages_lie_changes_no_bit(device):
    case = random_case(device, page_size=16)
    order = torch.randperm(len(case.kv_cache), device=device)
    exists = (case.block_table >= 0) & (case.block_table < len(order))
    moved = torch.where(
        exists, order.argsort().int()[torch.where(exists, case.block_table, 0).long()], case.block_table
    )
    assert_same_bits(replace(case, kv_cache=case.kv_cache[order], block_table=moved.int()).decode(), case.decode())


def test_pages_may_be_shared_and_repeated(device):
    case = random_case(device, (48, 48), page_size=16)
    table = case.block_table.clone()
    table[1, :2] = table[0, :2]  # a common prefix
    table[0, 2] = table[0, 1]  # a page twice in a row
    keys = [torch.cat((case.keys[0][:32], case.keys[0][16:32])), torch.cat((case.keys[0][:32], case.keys[1][32:]))]
    case = replace(case, block_table=table, keys=keys)
    assert_attention_close(case.decode(), case.truth())


@pytest.mark.parametrize("h", [1, 3, 9, 16, 63, 64, 65, 126, 128])
def test_any_number_of_heads(h, device):
    case = random_case(device, (0, 5, 70), h=h)
    assert_attention_close(case.decode(), case.truth())


@pytest.mark.parametrize(("width", "head_dim_v"), [(48, 32), (48, 48), (20, 1), (1, 1)])
@pytest.mark.parametrize("dtype", LIMITS)
def test_other_widths_of_keys_and_values(width, head_dim_v, dtype, device):
    case = random_case(device, (0, 1, 40), width=width, dtype=dtype, s_q=2)
    scale = width**-0.5
    got = case.decode(scale, head_dim_v=head_dim_v)
    want_out, want_lse, magnitude = case.truth(scale, head_dim_v=head_dim_v)
    if head_dim_v == 1:  # one element can cancel: no relative error of its row
        assert ((got[0].double() - want_out).abs() <= LIMITS[dtype] * magnitude + 1e-6).all()
        assert torch.allclose(got[1].double(), want_lse, rtol=2**-20, atol=1e-5)
    else:
        assert_attention_close(got, (want_out, want_lse, magnitude))


@pytest.mark.parametrize("dtype", LIMITS)
def test_an_fp8_cache_equals_its_dequantized_twin(dtype, device):
    case = random_case(device, s_q=2, dtype=torch.bfloat16)
    latents = case.kv_cache[..., :512].nan_to_num(0.0)
    q8, sf = per_token_cast_to_fp8(latents)
    rope = case.kv_cache[..., 512:].contiguous()
    fp8 = torch.cat([x.view(torch.uint8) for x in (q8, sf, rope)], -1)
    assert fp8.shape[-1] == 656
    twin = torch.cat((q8.double() * sf.double().repeat_interleave(128, -1), rope.double()), -1).to(dtype)
    case = replace(case, q=case.q.to(dtype))
    got = replace(case, kv_cache=fp8).decode()
    if device == "cuda" and dtype != torch.float32:  # there is a kernel
        possible = possible_tile_rows(*case.q.shape[1:3])
        cases = [as_read_by_a_kernel(replace(case, kv_cache=fp8), tile_rows) for tile_rows in possible]
        assert_attention_close_to_one(got, [x.truth() for x in cases])
    elif device == "cuda":
        keys = [held_by(twin, case, i) for i in range(len(case.keys))]
        assert_attention_close(got, replace(case, keys=keys).truth())
    else:
        assert_same_bits(got, replace(case, kv_cache=twin).decode())


def test_decoding_from_an_fp8_cache_is_attention_over_what_it_holds(device):
    case = random_case(device, s_q=2, page_size=64)
    q8, sf = per_token_cast_to_fp8(case.kv_cache[..., :512])
    fp8 = torch.cat([x.view(torch.uint8) for x in (q8, sf, case.kv_cache[..., 512:].contiguous())], -1)
    case = replace(case, kv_cache=fp8)
    if device == "cuda":
        possible = possible_tile_rows(*case.q.shape[1:3])
        truths = [as_read_by_a_kernel(case, tile_rows).truth() for tile_rows in possible]
    else:
        held = [held_by(fp8, case, i) for i in range(len(case.keys))]
        keys = [torch.stack([mla_dequantized(row) for row in rows]).bfloat16() if len(rows) else rows for rows in held]
        truths = [replace(case, keys=[k if len(k) else k.new_zeros(0, 576) for k in keys]).truth()]
    assert_attention_close_to_one(case.decode(), truths)


def held_by(pages, case, request):
    """The rows of `pages` `[num_pages, page_size, width]` that are a request's."""
    key = torch.arange(len(case.keys[request]), device=pages.device)
    return pages[case.block_table[request].long()[key // pages.shape[1]], key % pages.shape[1]]


def as_read_by_a_kernel(case, tile_rows):
    """The case of an FP8 cache with the keys and values that it holds."""
    read = [as_a_kernel_reads(held_by(case.kv_cache, case, i), tile_rows) for i in range(len(case.keys))]
    return replace(case, keys=[keys for keys, _ in read], values=[values for _, values in read])


@pytest.mark.parametrize("kv_scale", [1.0, 0.3, 2.0**-10, 40.0])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("s_q", [1, 3])
def test_attention_over_an_fp8_cache_of_one_scale(s_q, dtype, page_size, kv_scale, device):
    case = one_scale_case(device, (0, 1, 700, 64, 999), page_size, s_q=s_q, h=16, dtype=dtype, kv_scale=kv_scale)
    if device != "cuda":  # where the reference rounds keys to the type of q
        case = replace(case, keys=[x.to(dtype) for x in case.keys])
    for scale in (UNIT, PEAKY):
        assert_attention_close(case.decode(scale), case.truth(scale))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("s_q", [1, 3])
def test_attention_over_an_fp8_cache_of_many_keys(s_q, dtype, page_size, device):
    lengths, options = (0, 1, 700, 64, 999), {"s_q": s_q, "h": 16, "dtype": dtype}
    possible = possible_tile_rows(s_q, 16)
    cases = [fp8_case(device, lengths, page_size, tile_rows=tile_rows, **options) for tile_rows in possible]
    if device != "cuda":  # where the reference rounds keys to the type of q
        keys = [dequantized_rows(cases[0], i).to(dtype) for i in range(len(lengths))]
        cases = [replace(cases[0], keys=keys, values=None)]
    for scale in (UNIT, PEAKY):
        assert_attention_close_to_one(cases[0].decode(scale), [x.truth(scale) for x in cases])


def dequantized_rows(case, request):
    """The keys of a request by the formula, in float32."""
    rows = held_by(case.kv_cache, case, request)
    latents, sf, rotated = (x.contiguous() for x in rows.split([512, 16, 128], -1))
    scales = sf.view(torch.float32).repeat_interleave(128, -1)
    return torch.cat((latents.view(torch.float8_e4m3fn).float() * scales, rotated.view(torch.bfloat16).float()), -1)


def mla_dequantized(row):
    """The 576 values of one 656-byte row, in float64."""
    latent = row[:512].view(torch.float8_e4m3fn).double().view(4, 128)
    return torch.cat(
        (
            (latent * row[512:528].view(torch.float32).double()[:, None]).flatten(),
            row[528:].view(torch.bfloat16).double(),
        )
    )


@pytest.mark.parametrize("s_q", [1, 2, 5])
def test_ragged_equals_uniform(s_q, device):
    case = random_case(device, s_q=s_q)
    offsets = int32([i * s_q for i in range(len(LENGTHS) + 1)], device)
    out, lse = replace(case, q=case.q.flatten(0, 1)).decode(cu_seqlens_q=offsets)
    got = out.view(*case.q.shape[:-1], 512), lse.view(case.q.shape[:-1])
    assert_same_bits(got, case.decode())


@pytest.mark.parametrize("causal", [True, False])
def test_ragged_requests_have_numbers_of_queries_of_their_own(causal, device):
    counts, lengths = (1, 0, 4, 2, 7), (9, 33, 65, 0, 4)
    case = random_case(device, lengths)
    rows = torch.randn(sum(counts), 3, 576, device=device).bfloat16()
    offsets = [sum(counts[:i]) for i in range(len(counts) + 1)]
    out, lse = replace(case, q=rows).decode(cu_seqlens_q=int32(offsets, device), causal=causal)
    for i, (begin, end) in enumerate(pairwise(offsets)):
        one = replace(case, q=rows[None, begin:end], keys=case.keys[i : i + 1])
        if end > begin:
            assert_attention_close((out[None, begin:end], lse[None, begin:end]), one.truth(causal=causal))


@pytest.mark.parametrize(
    ("offsets", "owners"),
    [
        ((0, 3, 6), (0, 0, 0, 1, 1, 1, None, None)),
        ((2, 4, 8), (None, None, 0, 0, 1, 1, 1, 1)),
        ((-5, 3, INT_MAX), (0, 0, 0, 1, 1, 1, 1, 1)),
        ((2, 5, 4), (None, None, 0, 0, 0, None, None, None)),
        ((8, 2, 4), (None,) * 8),
        ((INT_MAX, -1, -(2**31)), (None,) * 8),
    ],
)
def test_wild_offsets_stay_in_bounds_and_leave_rows_to_nobody(offsets, owners, device):
    case = random_case(device, (40, 50))
    rows = torch.randn(8, 3, 576, device=device).bfloat16()
    out, lse = replace(case, q=rows).decode(cu_seqlens_q=int32(offsets, device))
    for i in range(2):
        mine = [row for row, owner in enumerate(owners) if owner == i]
        if mine:
            one = replace(case, q=rows[None, mine], keys=case.keys[i : i + 1])
            assert_attention_close((out[None, mine], lse[None, mine]), one.truth())
    nobodys = [row for row, owner in enumerate(owners) if owner is None]
    assert (out[nobodys] == 0).all()
    assert lse[nobodys].isneginf().all()


@pytest.mark.parametrize("make_case", [random_case, fp8_case, one_scale_case])
@pytest.mark.parametrize(("s_q", "h"), [(1, 16), (2, 128)])
def test_batch_invariant_requests_have_the_same_bits_in_any_company(s_q, h, make_case, device):
    lengths = (1, 500, 1024, 1025, 0, 3000) if device == "cpu" else (1, 500, 1024, 1025, 0, 3000, 9000, 20_000, 33_000)
    case = make_case(device, lengths, s_q=s_q, h=h)
    want = case.decode(batch_invariant=True)
    for i, length in enumerate(lengths):
        alone = {x: getattr(case, x)[i : i + 1] for x in ("q", "block_table", "cache_seqlens")}
        alone["block_table"] = alone["block_table"][:, : max(1, -(-length // case.kv_cache.shape[1]))]
        got = replace(case, **alone).decode(batch_invariant=True)
        assert_same_bits(got, (x[i : i + 1] for x in want))


def test_neighbours_change_no_bit(device):
    case = random_case(device, s_q=2)
    want = case.decode()
    for i in range(len(LENGTHS)):
        alone = replace(case, **{x: getattr(case, x)[i : i + 1] for x in ("q", "block_table", "cache_seqlens")})
        assert_same_bits(alone.decode(), (x[i : i + 1] for x in want))


def test_a_visible_nan_stays_in_its_request(device):
    case = random_case(device, (20, 20, 20), page_size=4)
    kv_cache = case.kv_cache.clone()
    kv_cache[case.block_table[1, 0]] = math.nan
    out, lse = replace(case, kv_cache=kv_cache).decode()
    assert out[1].isnan().all()
    assert lse[1].isnan().all()
    assert_same_bits((out[[0, 2]], lse[[0, 2]]), (x[[0, 2]] for x in case.decode()))


@pytest.mark.parametrize("magnitude", [0.0, 100.0, 1e4])
def test_extreme_logits_still_weigh_to_one(magnitude, device):
    keys = torch.randn(130, 576, device=device)
    keys[:, 0] = 1
    q = torch.randn(1, 1, 4, 576, device=device) * magnitude
    q[..., 0] = 0
    out, lse = paged([keys], q, 16).decode(1.0)
    assert out.isfinite().all()
    assert ((out[..., 0] - 1).abs() <= 2**-18).all()
    assert torch.allclose(lse, torch.logsumexp(q[0, 0].double() @ keys.double().T, -1).float(), rtol=1e-5)


@pytest.mark.parametrize("what", ["batch", "table", "pool", "queries"])
def test_empty_containers(what, device):
    case = random_case(device, (5, 6), s_q=2)
    q, kv_cache, table, seqlens = case.tensors()
    if what == "batch":
        q, table, seqlens = q[:0], table[:0], seqlens[:0]
    elif what == "table":
        table = table[:, :0]
    elif what == "pool":
        kv_cache = kv_cache[:0]
    else:
        q = q[:, :0]
    out, lse = mla_decode(q, kv_cache, table, seqlens, softmax_scale=1.0)
    assert out.shape == (*q.shape[:-1], 512)
    assert (out == 0).all()
    assert lse.shape == q.shape[:-1]
    assert lse.isneginf().all()


def test_no_request_owns_no_row(device):
    case = random_case(device, ())
    rows = torch.randn(3, 2, 576, device=device).bfloat16()
    out, lse = mla_decode(
        rows, case.kv_cache, case.block_table, case.cache_seqlens, softmax_scale=1.0, cu_seqlens_q=int32([0], device)
    )
    assert (out == 0).all()
    assert lse.isneginf().all()


def test_strided_queries_and_caches_give_the_same_bits(device):
    case = random_case(device, s_q=2)
    wide_q = torch.randn(*case.q.shape[:-1], 640, device=device).bfloat16()
    wide_q[..., :576] = case.q
    layers = torch.randn(len(case.kv_cache), 3, 16, 576, device=device).bfloat16()
    layers[:, 1] = case.kv_cache
    strided = replace(
        case,
        q=wide_q[..., :576],
        kv_cache=layers[:, 1],
        block_table=case.block_table.repeat(1, 2)[:, : case.block_table.shape[1]],
    )
    assert_same_bits(strided.decode(), case.decode())


def test_the_out_form_writes_every_element_and_nothing_else(device):
    case = random_case(device, s_q=2)
    shape = (*case.q.shape[:-1], 512)
    out = Guarded(shape, torch.bfloat16, device, strides=(6 * 640, 3 * 640, 640, 1))
    lse = Guarded(shape[:-1], torch.float32, device)
    assert mla_decode_out(*case.tensors(), out.tensor, lse.tensor, softmax_scale=UNIT) is None
    assert_same_bits((out.tensor, lse.tensor), case.decode())
    out.assert_intact()
    lse.assert_intact()


@pytest.mark.parametrize("op", ["mla_decode", "mla_decode_out", "mla_prefill", "merge_attn_states"])
def test_references_read_no_value_on_the_host(op):
    args = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in SAMPLES[op]("cpu")]
    OPS[op].reference(*args)  # meta tensors have no values to read


# ------------------------------------------------------------------------------------------------- prefill


def prefill_case(device, lengths_q, lengths_k, *, h=2, dims=(192, 128), dtype=torch.bfloat16):
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    q, k, v = (
        torch.randn(t, h, d, device=device).to(dtype)
        for t, d in zip((total_q, total_k, total_k), (dims[0], *dims), strict=True)
    )
    cu_q, cu_k = ([sum(lengths[:i]) for i in range(len(lengths) + 1)] for lengths in (lengths_q, lengths_k))
    return q, k, v, cu_q, cu_k


def prefill_truth(q, k, v, cu_q, cu_k, scale, causal=True):
    total_q, h, _ = q.shape
    out, lse = (
        q.new_zeros((total_q, h, v.shape[-1]), dtype=torch.float64),
        q.new_full((total_q, h), -math.inf, dtype=torch.float64),
    )
    magnitude = out.clone()
    for i in range(len(cu_q) - 1):
        s_q, s_k = cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i]
        for j in range(s_q):
            row, end = cu_q[i] + j, cu_k[i] + (max(0, s_k - s_q + j + 1) if causal else s_k)
            for head in range(h):
                keys, values = k[cu_k[i] : end, head], v[cu_k[i] : end, head]
                out[row, head], lse[row, head], magnitude[row, head] = attention(q[row, head], keys, values, scale)
    return out, lse, magnitude


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dims", [(192, 128), (24, 40)])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("lengths", [((5,), (5,)), ((3, 0, 7, 2, 6), (9, 4, 7, 0, 2)), ((), ())], ids=str)
def test_prefill_is_attention_of_each_sequence(lengths, dtype, dims, causal, device):
    q, k, v, cu_q, cu_k = prefill_case(device, *lengths, dims=dims, dtype=dtype)
    for scale in (dims[0] ** -0.5, 4 * dims[0] ** -0.5):
        got = mla_prefill(q, k, v, int32(cu_q, device), int32(cu_k, device), softmax_scale=scale, causal=causal)
        assert_attention_close(got, prefill_truth(q, k, v, cu_q, cu_k, scale, causal))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prefill_over_tiles_that_are_whole_and_that_are_not(dtype, causal, device):
    """Tiles are of 128 queries and keys, and 64 queries of a warpgroup."""
    lengths = (129, 64, 0, 200, 128), (129, 300, 65, 90, 256)
    q, k, v, cu_q, cu_k = prefill_case(device, *lengths, h=3, dtype=dtype)
    for scale in (192**-0.5, 4 * 192**-0.5):
        got = mla_prefill(q, k, v, int32(cu_q, device), int32(cu_k, device), softmax_scale=scale, causal=causal)
        assert_attention_close(got, prefill_truth(q, k, v, cu_q, cu_k, scale, causal))


@pytest.mark.parametrize("key", [0, 63, 100, 128, 199])
def test_a_value_that_is_not_finite_is_felt_in_its_channel_by_those_who_see_it(key, device):
    q, k, v, cu_q, cu_k = prefill_case(device, (200,), (200,))
    offsets = int32(cu_q, device), int32(cu_k, device)
    want = mla_prefill(q, k, v, *offsets, softmax_scale=0.1)
    for poison in (math.nan, math.inf):
        v[key, 1, 77] = poison
        out, lse = mla_prefill(q, k, v, *offsets, softmax_scale=0.1)
        hit = torch.zeros_like(out, dtype=torch.bool)
        hit[key:, 1, 77] = True
        assert torch.equal(lse, want[1])
        assert torch.equal(out.isnan(), hit)
        assert torch.equal(out[~hit], want[0][~hit])


@pytest.mark.parametrize("length", [n for n in LENGTHS if n])
def test_each_query_of_prefill_finds_its_own_last_key(length, device):
    u = torch.randn(192, device=device)
    k = (u * (1 + torch.arange(length, device=device)[:, None] / 4))[:, None]
    v = name_keys(torch.randn(length, 128, device=device))[:, None]
    q, offsets = u.expand(length, 1, 192).contiguous(), int32([0, length], device)
    out, _ = mla_prefill(q, k, v, offsets, offsets, softmax_scale=0.4)
    assert torch.equal(named_key(out)[:, 0], torch.arange(length, device=device))


def test_prefill_in_chunks_of_queries_is_the_same(device, monkeypatch):
    if device != "cpu":
        pytest.skip("the chunks are the reference's")
    q, k, v, cu_q, cu_k = prefill_case(device, (9, 3), (12, 3))
    monkeypatch.setattr(mla, "QUERY_CHUNK", 4)
    got = mla_prefill(q, k, v, int32(cu_q, device), int32(cu_k, device), softmax_scale=0.1)
    assert_attention_close(got, prefill_truth(q, k, v, cu_q, cu_k, 0.1))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_keys_and_values_that_a_query_does_not_see_leave_no_trace(poison, device):
    q, k, v, cu_q, cu_k = prefill_case(device, (4, 5), (4, 7))
    offsets = int32(cu_q, device), int32(cu_k, device)
    want = mla_prefill(q, k, v, *offsets, softmax_scale=0.1)
    k[3] = v[3] = poison  # the last key of the first sequence: its last query alone sees it
    got = mla_prefill(q, k, v, *offsets, softmax_scale=0.1)
    others = [0, 1, 2, 4, 5, 6, 7, 8]
    assert_same_bits((x[others] for x in got), (x[others] for x in want))
    assert got[0][3].isnan().all()


def test_a_visible_nan_stays_in_its_channel(device):
    q, k, v, cu_q, cu_k = prefill_case(device, (4,), (4,))
    want = mla_prefill(q, k, v, int32(cu_q, device), int32(cu_k, device), softmax_scale=0.1)
    v[1, 0, 5] = math.nan
    out, lse = mla_prefill(q, k, v, int32(cu_q, device), int32(cu_k, device), softmax_scale=0.1)
    assert torch.equal(lse, want[1])
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[1:, 0, 5] = True
    assert torch.equal(out.isnan(), hit)
    assert torch.equal(out[~hit], want[0][~hit])


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "ranges"),
    [
        ((0, 3, 6), (0, 4, 9), [(0, 3, 0, 4), (3, 6, 4, 9)]),
        ((-7, 3, INT_MAX), (-1, 4, INT_MAX), [(0, 3, 0, 4), (3, 8, 4, 9)]),
        ((2, 0, 5), (0, 4, 9), [(2, 5, 4, 9)]),
        ((0, 3, 8), (9, 4, 6), [(0, 3, 0, 0), (3, 8, 0, 0)]),
        ((INT_MAX, 0, -1), (0, 4, 9), []),
    ],
)
def test_wild_offsets_of_prefill_stay_in_bounds(cu_q, cu_k, ranges, device):
    q, k, v, *_ = prefill_case(device, (8,), (9,))
    out, lse = mla_prefill(q, k, v, int32(cu_q, device), int32(cu_k, device), softmax_scale=0.1)
    want_out, want_lse = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    want_magnitude = want_out.double()
    for q_begin, q_end, k_begin, k_end in ranges:
        rows, keys = slice(q_begin, q_end), slice(k_begin, k_end)
        truth = prefill_truth(q[rows], k[keys], v[keys], (0, q_end - q_begin), (0, k_end - k_begin), 0.1)
        want_out = want_out.double()
        want_lse = want_lse.double()
        want_out[rows], want_lse[rows], want_magnitude[rows] = truth
    assert_attention_close((out, lse), (want_out, want_lse, want_magnitude))


def test_prefill_takes_slices_of_wider_projections(device):
    q, k, v, cu_q, cu_k = prefill_case(device, (5,), (5,))
    offsets = int32(cu_q, device), int32(cu_k, device)
    kv = torch.cat((k, v), -1)
    got = mla_prefill(q, kv[..., :192], kv[..., 192:], *offsets, softmax_scale=0.1)
    assert_same_bits(got, mla_prefill(q, k, v, *offsets, softmax_scale=0.1))


@pytest.mark.parametrize("s_q", [1, 2, 5])
def test_absorbed_decoding_equals_expanded_prefill(s_q, device):
    """The same attention twice: once over latents with the up-projections folded into q and out, once over keys and
    values expanded from the cache."""
    h, nope, rope, latent, v_dim, scale = 4, 24, 16, 32, 24, 0.15
    lengths = (s_q, s_q + 9, 40)
    case = random_case(device, lengths, page_size=8, s_q=s_q, h=h, width=latent + rope, dtype=torch.float32)
    w_uk = torch.randn(h, nope, latent, device=device) / latent**0.5
    w_uv = torch.randn(h, v_dim, latent, device=device) / latent**0.5
    q_nope, q_pe = torch.randn(3, s_q, h, nope, device=device), torch.randn(3, s_q, h, rope, device=device)

    absorbed = torch.cat((torch.einsum("bqhn,hnc->bqhc", q_nope, w_uk), q_pe), -1)
    out, lse = replace(case, q=absorbed).decode(scale, head_dim_v=latent)
    out = torch.einsum("bqhc,hvc->bqhv", out, w_uv).flatten(0, 1)

    cu_k = int32([sum(lengths[:i]) for i in range(4)], device)
    rows = mla_cache_gather(case.kv_cache, case.block_table, cu_k, sum(lengths), out_dtype=torch.float32)
    kv_c, k_pe = rows[:, None, :latent], rows[:, None, latent:].expand(-1, h, -1)
    k = torch.cat((torch.einsum("tgc,hnc->thn", kv_c, w_uk), k_pe), -1)
    v = torch.einsum("tgc,hvc->thv", kv_c, w_uv)
    q = torch.cat((q_nope, q_pe), -1).flatten(0, 1)
    cu_q = int32([0, s_q, 2 * s_q, 3 * s_q], device)
    want_out, want_lse = mla_prefill(q, k, v, cu_q, cu_k, softmax_scale=scale)
    assert relative_error(out, want_out, -1).max() <= 1e-5
    assert (lse.flatten(0, 1) - want_lse).abs().max() <= 1e-5


# ------------------------------------------------------------------------------------------------- merging


def states(device, lengths, *, dtype=torch.bfloat16, scale=UNIT, width=576):
    """The attention of the same queries over disjoint sets of keys, and over all of them."""
    q = torch.randn(2, 3, width, device=device).to(dtype)
    keys = [torch.randn(n, width, device=device).to(dtype) for n in lengths]
    parts = [attention(q, k, k[:, :512], scale)[:2] for k in keys]
    whole = torch.cat(keys)
    return [(out.to(dtype), lse.float()) for out, lse in parts], attention(q, whole, whole[:, :512], scale)


@pytest.mark.parametrize("scale", [UNIT, PEAKY], ids=["unit", "peaky"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("lengths", [(1, 1), (64, 3), (5, 0), (0, 5), (0, 0), (7, 0, 64, 1, 0, 9)], ids=str)
def test_merging_parts_gives_the_whole(lengths, dtype, scale, device):
    (first, *others), truth = states(device, lengths, dtype=dtype, scale=scale)
    merged = first
    for other in others:
        merged = merge_attn_states(*merged, *other)
    assert merged[0].dtype == dtype
    # Every merge rounds once more, and each part was rounded before.
    assert_attention_close(merged, (truth[0], truth[1], truth[2] * 2))


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, 7.0])
@pytest.mark.parametrize("dtype", LIMITS)
def test_an_empty_part_leaves_the_other_bit_for_bit(dtype, rubbish, device):
    out, lse = torch.randn(5, 3, 16, device=device).to(dtype), torch.randn(5, 3, device=device)
    out[0, 0] = -0.0
    nothing = torch.full_like(out, rubbish), torch.full_like(lse, -math.inf)
    assert_same_bits(merge_attn_states(out, lse, *nothing), (out, lse))
    assert_same_bits(merge_attn_states(*nothing, out, lse), (out, lse))
    zeros, none = merge_attn_states(*nothing, *nothing)
    assert (zeros == 0).all()
    assert none.isneginf().all()


@pytest.mark.parametrize("gap", [30.0, 200.0, 1e30])
def test_a_part_that_weighs_nothing_changes_nothing(gap, device):
    a, b = torch.randn(2, 4, 3, 16, device=device)
    lse = torch.randn(4, 3, device=device)
    for out, merged in (merge_attn_states(a, lse + gap, b, lse), merge_attn_states(b, lse, a, lse + gap)):
        assert torch.allclose(out, a, rtol=0, atol=1e-5)
        assert torch.allclose(merged, lse + gap)


def test_merging_takes_any_leading_dimensions(device):
    for lead in ((), (4,), (2, 0), (2, 3, 4)):
        out, lse = torch.randn(*lead, 3, 16, device=device), torch.randn(*lead, 3, device=device)
        merged, merged_lse = merge_attn_states(out, lse, out, lse)
        assert torch.allclose(merged, out)
        assert torch.allclose(merged_lse, lse + math.log(2))
