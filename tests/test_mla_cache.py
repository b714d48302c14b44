"""The paged latent cache: what a row holds, which rows are written, and reading them back."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_ops import MLA_FP8_ROW_BYTES, mla_cache_gather, mla_cache_shape, mla_cache_write, rope_cos_sin
from deepseek_ops.registry import OPS
from tests.samples import SAMPLES
from tests.support import Guarded, assert_rows_close, bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-21}
"""Relative error of one rounding, with room for float32 arithmetic before it."""
INT_MAX = 2**31 - 1
FP8 = torch.float8_e4m3fn


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def rotated(k_pe, positions, cos_sin, interleaved):
    """float64, pair by pair, as a complex product."""
    x, (cos, sin) = k_pe.double(), cos_sin.double()[positions.long()].chunk(2, -1)
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        z = torch.complex(x[:, a], x[:, b]) * torch.complex(cos[:, i], sin[:, i])
        out[:, a], out[:, b] = z.real, z.imag
    return out


def normed(kv_c, weight, eps):
    x = kv_c.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def unpacked(rows):
    """float64 values of 656-byte rows."""
    latents = rows[:, :512].contiguous().view(torch.float8_e4m3fn).double().view(-1, 4, 128)
    sf = rows[:, 512:528].contiguous().view(torch.float32).double()
    return torch.cat(
        ((latents * sf[..., None]).flatten(1), rows[:, 528:].contiguous().view(torch.bfloat16).double()), -1
    )


def tokens(device, t=9, *, kv_lora_rank=512, rope_dim=64, dtype=torch.bfloat16):
    kv_c, k_pe = (
        torch.randn(t, kv_lora_rank, device=device).to(dtype),
        torch.randn(t, rope_dim, device=device).to(dtype),
    )
    positions = torch.randint(0, 50, (t,), device=device)
    return kv_c, k_pe, positions, rope_cos_sin(50, rope_dim, device=device)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("extents", [(512, 64), (32, 16), (5, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_normed_latent_and_the_rotated_key(dtype, extents, norm, interleaved, device):
    kv_c, k_pe, positions, cos_sin = tokens(device, kv_lora_rank=extents[0], rope_dim=extents[1], dtype=dtype)
    weight = torch.rand(extents[0], device=device).to(dtype) + 0.5 if norm else None
    cache = torch.zeros(mla_cache_shape(4, 4, kv_lora_rank=extents[0], rope_dim=extents[1]), dtype=dtype, device=device)
    slots = torch.randperm(16, device=device)[:9]
    mla_cache_write(kv_c, k_pe, positions, cos_sin, slots, cache, norm_weight=weight, eps=1e-3, interleaved=interleaved)
    rows = cache.view(16, -1)[slots].double()
    want_latent = kv_c.double() if weight is None else normed(kv_c, weight, 1e-3)
    want = torch.cat((want_latent, rotated(k_pe, positions, cos_sin, interleaved)), -1)
    assert ((rows - want).abs() <= ROUNDING[dtype] * want.abs() + 1e-6).all()
    if weight is None:
        assert torch.equal(rows[:, : extents[0]], kv_c.double())


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_fp8_row_has_four_scales_and_an_exact_key(dtype, norm, device):
    kv_c, k_pe, positions, cos_sin = tokens(device, dtype=dtype)
    kv_c[0, :128] = 0
    kv_c[1, 128:256] *= 50
    weight = torch.rand(512, device=device).to(dtype) + 0.5 if norm else None
    cache = torch.zeros(mla_cache_shape(4, 4, dtype=torch.uint8), dtype=torch.uint8, device=device)
    slots = torch.randperm(16, device=device)[:9]
    mla_cache_write(kv_c, k_pe, positions, cos_sin, slots, cache, norm_weight=weight)
    rows = cache.view(16, MLA_FP8_ROW_BYTES)[slots]

    latent = (kv_c.double() if weight is None else normed(kv_c, weight, 1e-6)).view(9, 4, 128)
    amax = latent.abs().amax(-1).clamp(min=1e-4)
    sf = rows[:, 512:528].contiguous().view(torch.float32).double()
    assert torch.allclose(sf, amax / 448, rtol=2 * ROUNDING[dtype])
    got = unpacked(rows)
    error = (got[:, :512].view(9, 4, 128) - latent).abs()
    assert (error <= 2.0**-4 * latent.abs() + amax[..., None] * 2.0**-10 / 448 + ROUNDING[dtype] * latent.abs()).all()
    want_rope = rotated(k_pe, positions, cos_sin, True)
    assert ((got[:, 512:] - want_rope).abs() <= 2.0**-8 * want_rope.abs() + 1e-6).all()


@pytest.mark.parametrize("kv_scale", [1.0, 0.01, 7.0])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_one_scale_is_rounded_once_and_saturates(dtype, norm, kv_scale, device):
    kv_c, k_pe, positions, cos_sin = tokens(device, dtype=dtype)
    kv_c[0, 3] = 3e4
    weight = torch.rand(512, device=device).to(dtype) + 0.5 if norm else None
    cache = torch.zeros(mla_cache_shape(4, 4, dtype=FP8), device=device).to(FP8)
    slots = torch.randperm(16, device=device)[:9]
    mla_cache_write(kv_c, k_pe, positions, cos_sin, slots, cache, norm_weight=weight, kv_scale=kv_scale)
    got = cache.view(16, 576)[slots].double() * kv_scale
    want_latent = kv_c.double() if weight is None else normed(kv_c, weight, 1e-6)
    want = torch.cat((want_latent, rotated(k_pe, positions, cos_sin, True)), -1).clamp(-448 * kv_scale, 448 * kv_scale)
    bound = (2.0**-4 + 2 * ROUNDING[dtype]) * want.abs() + 2.0**-10 * kv_scale + 1e-6
    assert ((got - want).abs() <= bound).all()


@pytest.mark.parametrize("fp8", [False, True])
def test_only_the_rows_of_valid_slots_are_written(fp8, device):
    kv_c, k_pe, positions, cos_sin = tokens(device, 8)
    shape = mla_cache_shape(3, 5, dtype=torch.uint8 if fp8 else torch.bfloat16)
    slots = torch.tensor([-1, 7, 15, 14, INT_MAX, 0, -(2**63), 2**62], device=device)
    cache = Guarded(shape, torch.uint8 if fp8 else torch.bfloat16, device)
    before = bits(cache.tensor).clone().view(15, -1)
    mla_cache_write(kv_c, k_pe, positions, cos_sin, slots, cache.tensor)
    cache.assert_intact()
    after = bits(cache.tensor).view(15, -1)
    changed = (after != before).any(-1).nonzero().squeeze(1).tolist()
    assert changed == [0, 7, 14]

    alone = cache.tensor.clone()
    live = [1, 3, 5]
    mla_cache_write(kv_c[live], k_pe[live], positions[live], cos_sin, slots[live], alone)
    assert torch.equal(bits(alone), bits(cache.tensor))


@pytest.mark.parametrize("fp8", [False, True])
def test_a_row_does_not_depend_on_how_many_are_written(fp8, device):
    """Of so many that a kernel may give each warp several tokens, the last fewer than the others."""
    t = 9001
    kv_c, k_pe, positions, cos_sin = tokens(device, t)
    weight = torch.rand(512, device=device) + 0.5
    slots = torch.randperm(9024, device=device)[:t]
    slots[::100] = -1
    dtype = torch.uint8 if fp8 else torch.bfloat16
    together, apart = (torch.zeros(mla_cache_shape(141, 64, dtype=dtype), dtype=dtype, device=device) for _ in range(2))
    mla_cache_write(kv_c, k_pe, positions, cos_sin, slots, together, norm_weight=weight)
    for some in torch.arange(t, device=device).split(700):
        mla_cache_write(kv_c[some], k_pe[some], positions[some], cos_sin, slots[some], apart, norm_weight=weight)
    assert torch.equal(bits(together), bits(apart))


@pytest.mark.parametrize("slots", [[-1, -1, 15], []])
def test_without_a_valid_slot_nothing_changes(slots, device):
    kv_c, k_pe, positions, cos_sin = tokens(device, len(slots))
    cache = Guarded((3, 5, 576), torch.bfloat16, device)
    before = bits(cache.tensor).clone()
    mla_cache_write(kv_c, k_pe, positions, cos_sin, torch.tensor(slots, device=device, dtype=torch.int64), cache.tensor)
    assert torch.equal(bits(cache.tensor), before)
    cache.assert_intact()


def test_a_cache_without_pages_takes_nothing(device):
    kv_c, k_pe, positions, cos_sin = tokens(device, 2)
    cache = torch.zeros(0, 4, 576, dtype=torch.bfloat16, device=device)
    mla_cache_write(kv_c, k_pe, positions, cos_sin, torch.tensor([0, -1], device=device), cache)


def test_pages_may_lie_apart(device):
    kv_c, k_pe, positions, cos_sin = tokens(device)
    slots = torch.randperm(12, device=device)[:9]
    layers = Guarded((3, 4, 576), torch.bfloat16, device, strides=(2 * 4 * 576, 576, 1))
    whole = torch.full((3, 4, 576), math.nan, dtype=torch.bfloat16, device=device)
    for cache in (layers.tensor, whole):
        mla_cache_write(kv_c, k_pe, positions, cos_sin, slots, cache)
    layers.assert_intact()
    written = torch.zeros(12, dtype=torch.bool, device=device).index_fill(0, slots, True).view(3, 4)
    assert torch.equal(layers.tensor[written], whole[written])


def test_inputs_may_be_slices_of_a_projection(device):
    kv_c, k_pe, positions, cos_sin = tokens(device)
    both = torch.cat((kv_c, k_pe), -1)
    caches = [torch.zeros(3, 4, 576, dtype=torch.bfloat16, device=device) for _ in range(2)]
    mla_cache_write(kv_c, k_pe, positions, cos_sin, torch.arange(9, device=device), caches[0])
    mla_cache_write(both[:, :512], both[:, 512:], positions, cos_sin, torch.arange(9, device=device), caches[1])
    assert torch.equal(*caches)


def test_int32_positions_and_slots_and_positions_out_of_range(device):
    kv_c, k_pe, _, cos_sin = tokens(device, 3)
    caches = [torch.zeros(3, 4, 576, dtype=torch.bfloat16, device=device) for _ in range(2)]
    mla_cache_write(kv_c, k_pe, int32([-4, 7, INT_MAX], device), cos_sin, int32([3, 0, 8], device), caches[0])
    positions, slots = torch.tensor([0, 7, 49], device=device), torch.tensor([3, 0, 8], device=device)
    mla_cache_write(kv_c, k_pe, positions, cos_sin, slots, caches[1])
    assert torch.equal(*caches)


# ------------------------------------------------------------------------------------------------- gathering


@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, FP8])
def test_what_was_written_is_gathered_back(dtype, page_size, device):
    lengths = (0, 5, 64, 1, 65)
    high = torch.bfloat16 if dtype in (torch.uint8, FP8) else dtype
    scale = {"kv_scale": 0.02 if dtype == FP8 else 1.0}
    kv_c, k_pe, _, cos_sin = tokens(device, sum(lengths), dtype=high)
    positions = torch.zeros(sum(lengths), dtype=torch.int64, device=device)  # rotates by nothing
    counts = [-(-n // page_size) for n in lengths]
    pages = torch.randperm(sum(counts)).tolist()
    table = [[pages.pop() for _ in range(n)] + [INT_MAX] * (max(counts) - n) for n in counts]
    slots = [
        row[j // page_size] * page_size + j % page_size for row, n in zip(table, lengths, strict=True) for j in range(n)
    ]
    cache = torch.full(mla_cache_shape(sum(counts), page_size, dtype=dtype), 255, device=device).to(dtype)
    mla_cache_write(kv_c, k_pe, positions, cos_sin, torch.tensor(slots, device=device), cache, **scale)

    offsets = int32([sum(lengths[:i]) for i in range(6)], device)
    rows = mla_cache_gather(cache, int32(table, device), offsets, sum(lengths), out_dtype=torch.float32, **scale)
    want = torch.cat((kv_c, k_pe), -1).float()
    if dtype == torch.uint8:
        assert_rows_close(rows[:, :512], want[:, :512], 0.04)  # what e4m3 costs
        assert torch.equal(rows[:, 512:], want[:, 512:])
        assert torch.equal(rows, unpacked(cache.view(-1, 656)[slots]).float())
    elif dtype == FP8:
        assert_rows_close(rows, want, 0.04)
        held = cache.view(torch.uint8).view(-1, 576)[slots].view(FP8)
        assert torch.equal(rows, held.float() * scale["kv_scale"])
    else:
        assert torch.equal(rows, want)
    for out_dtype in DTYPES:
        got = mla_cache_gather(cache, int32(table, device), offsets, sum(lengths), out_dtype=out_dtype, **scale)
        assert torch.equal(got, rows.to(out_dtype))


@pytest.mark.parametrize(
    ("offsets", "sources"),
    [
        ((0, 2, 4), [(0, 0), (0, 1), (1, 0), (1, 1), None, None]),
        ((1, 3, 6), [None, (0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]),
        ((-9, 2, INT_MAX), [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]),
        ((1, 3, 2), [None, (0, 0), (0, 1), None, None, None]),
        ((0, 6, 6), [(0, 0), (0, 1), (0, 2), (0, 3), None, None]),  # a table of four tokens
        ((INT_MAX, 0, -1), [None] * 6),
    ],
)
def test_rows_of_no_request_and_past_a_table_are_zeros(offsets, sources, device):
    cache = torch.randn(5, 2, 48, device=device)
    table = int32([[3, 1], [4, 0]], device)
    rows = mla_cache_gather(cache, table, int32(offsets, device), 6, out_dtype=torch.float32)
    for row, source in zip(rows, sources, strict=True):
        if source is None:
            assert (row == 0).all()
        else:
            request, token = source
            assert torch.equal(row, cache[table[request, token // 2], token % 2])


@pytest.mark.parametrize("page", [-1, 5, INT_MAX, -(2**31)])
def test_rows_of_pages_that_do_not_exist_are_zeros(page, device):
    cache = torch.full((5, 2, 48), math.nan, device=device)
    cache[3] = 1
    rows = mla_cache_gather(cache, int32([[page, 3]], device), int32([0, 4], device), 4, out_dtype=torch.bfloat16)
    assert torch.equal(rows[:, 0], torch.tensor([0, 0, 1, 1], dtype=torch.bfloat16, device=device))


def test_gathering_from_nothing_gives_zeros(device):
    cache, table, offsets = torch.randn(5, 2, 48, device=device), int32([[3, 1]], device), int32([0, 3], device)
    assert (mla_cache_gather(cache[:0], table, offsets, 3, out_dtype=torch.float32) == 0).all()
    assert (mla_cache_gather(cache, table[:, :0], offsets, 3, out_dtype=torch.float32) == 0).all()
    assert (mla_cache_gather(cache, table[:0], offsets[:1], 3, out_dtype=torch.float32) == 0).all()
    assert mla_cache_gather(cache, table, offsets, 0).shape == (0, 48)


@pytest.mark.parametrize("op", ["mla_cache_write", "mla_cache_gather"])
def test_references_read_no_value_on_the_host(op):
    args = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in SAMPLES[op]("cpu")]
    OPS[op].reference(*args)  # meta tensors have no values to read


def test_shapes_of_caches():
    assert mla_cache_shape(7, 64) == (7, 64, 576)
    assert mla_cache_shape(7, 64, dtype=torch.uint8) == (7, 64, 656)
    assert mla_cache_shape(7, 64, dtype=FP8) == (7, 64, 576)
    assert mla_cache_shape(7, 64, kv_lora_rank=32, rope_dim=16) == (7, 64, 48)
    with pytest.raises(ValueError, match=r"512 \+ 64 channels, got 32 \+ 16"):
        mla_cache_shape(7, 64, kv_lora_rank=32, rope_dim=16, dtype=torch.uint8)
