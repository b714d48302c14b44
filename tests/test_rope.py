"""The rotation against complex numbers in float64, and the table against Python's own arithmetic and transformers."""

import functools
import math

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deepseek_ops import YarnScaling, rope, rope_cos_sin
from tests.support import assert_rounded_once, assert_same

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MAX_POSITION = 163840
V3 = YarnScaling(40, 4096, mscale=1.0, mscale_all_dim=1.0)
V2 = YarnScaling(40, 4096, mscale=0.707, mscale_all_dim=0.707)


@functools.cache
def long_table(d, device):
    return rope_cos_sin(MAX_POSITION, d, device=device)


def true_rope(x, positions, interleaved):
    """Complex multiplication in float64, with base 10000."""
    d = x.shape[-1]
    x = x.double()
    re, im = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., : d // 2], x[..., d // 2 :])
    frequencies = torch.tensor([10000.0 ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)
    angles = positions.cpu().double()[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles).to(x.device)
    turned = torch.complex(re, im) * turn.view(len(positions), *[1] * (x.dim() - 2), d // 2)
    want = torch.empty_like(x)
    if interleaved:
        want[..., 0::2], want[..., 1::2] = turned.real, turned.imag
    else:
        want[..., : d // 2], want[..., d // 2 :] = turned.real, turned.imag
    length = torch.complex(re, im).abs()
    return want, torch.stack((length, length), -1 if interleaved else -2).reshape(x.shape)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("d", [2, 4, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotates_each_pair_by_its_angle_and_rounds_once(dtype, d, interleaved, device):
    positions = torch.tensor([0, 1, 2, 63, 64, 4095, 163839, 5], device=device)
    x = (torch.randn(8, 3, d) * 10).to(device, dtype)
    got = rope(x, positions, long_table(d, device), interleaved=interleaved)
    assert got.dtype == dtype
    assert_rounded_once(got, *true_rope(x, positions, interleaved))


@pytest.mark.parametrize("interleaved", [True, False])
def test_position_zero_changes_no_bit(interleaved, device):
    x = torch.randn(4, 2, 64, device=device).bfloat16()
    zero = torch.zeros(4, dtype=torch.int32, device=device)
    assert_same(rope(x, zero, rope_cos_sin(8, 64, device=device), interleaved=interleaved), x)


def test_half_split_pairs_are_the_interleaved_ones_in_another_order(device):
    x, positions = torch.randn(5, 4, 64, device=device).bfloat16(), torch.arange(5, device=device)
    table = rope_cos_sin(5, 64, device=device)
    halves = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    got = rope(halves, positions, table, interleaved=False)
    want = rope(x, positions, table, interleaved=True)
    assert_same(got, torch.cat((want[..., 0::2], want[..., 1::2]), -1))


@pytest.mark.parametrize("interleaved", [True, False])
def test_products_depend_on_the_distance_only(interleaved, device):
    q, k = torch.randn(2, 1, 64, device=device)
    table = rope_cos_sin(5000, 64, scaling=V3, device=device)
    product = []
    for position in (0, 1, 700, 4900):
        at = [torch.tensor([p], device=device) for p in (position + 37, position)]
        q_pe, k_pe = (rope(x[None], p, table, interleaved=interleaved) for x, p in zip((q, k), at, strict=True))
        product.append((q_pe.double() * k_pe.double()).sum())
    torch.testing.assert_close(torch.stack(product), product[0].expand(4), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("position", "row"), [(-1, 0), (-(2**31), 0), (16, 15), (2**31 - 1, 15), (-(2**63), 0), (2**63 - 1, 15)]
)
def test_positions_outside_the_table_are_clamped_into_it(position, row, device):
    table = torch.randn(17, 64, device=device)[:16]
    dtype = torch.int32 if -(2**31) <= position < 2**31 else torch.int64
    x = torch.randn(3, 2, 64, device=device).bfloat16()
    wild = torch.tensor([2, position, 3], dtype=dtype, device=device)
    assert_same(rope(x, wild, table), rope(x, torch.tensor([2, row, 3], device=device), table))


@pytest.mark.parametrize("shape", [(5, 64), (5, 1, 64), (5, 2, 3, 64), (0, 4, 64), (5, 0, 64), (1, 64)])
def test_takes_any_shape(shape, device):
    x, positions = torch.randn(shape, device=device).bfloat16(), torch.arange(shape[0], device=device)
    table = rope_cos_sin(8, 64, device=device)
    y = rope(x, positions, table)
    assert y.shape == shape
    heads = math.prod(shape[1:-1])
    flat = rope(x.reshape(shape[0] * heads, 64), positions.repeat_interleave(heads), table)
    assert_same(y, flat.view(shape))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_how_many_are_rotated(dtype, interleaved, device):
    """Of so many that a kernel may give each thread several heads, the last fewer than the others."""
    x, positions = torch.randn(271, 130, 64, device=device).to(dtype), torch.arange(271, device=device)
    table = rope_cos_sin(271, 64, device=device)
    parts = [rope(x[i : i + 20], positions[i : i + 20], table, interleaved=interleaved) for i in range(0, 271, 20)]
    assert_same(rope(x, positions, table, interleaved=interleaved), torch.cat(parts))


@pytest.mark.parametrize("interleaved", [True, False])
def test_strided_input_gives_the_bits_of_a_contiguous_one(interleaved, device):
    q, positions = torch.randn(6, 4, 192, device=device).bfloat16(), torch.arange(6, device=device)
    table = rope_cos_sin(8, 64, device=device)
    for x in (q[..., 128:], q[:, ::2, 1:65], q[:, :1, :64].expand(6, 3, 64), q[..., :64].transpose(0, 1)[:, :4]):
        at = positions[: len(x)]
        got = rope(x, at, table, interleaved=interleaved)
        assert_same(got, rope(x.contiguous(), at, table, interleaved=interleaved))
    wide = rope_cos_sin(8, 128, device=device)[::2, :64]
    assert_same(rope(q[..., :64], positions, wide), rope(q[..., :64], positions, wide.contiguous()))


@pytest.mark.parametrize(("interleaved", "partner"), [(True, 7), (False, 38)])
def test_nan_stays_in_its_pair(interleaved, partner, device):
    x, positions = torch.randn(3, 2, 64, device=device), torch.tensor([1, 2, 3], device=device)
    table = rope_cos_sin(8, 64, device=device)
    clean = rope(x, positions, table, interleaved=interleaved)
    x[1, 0, 6] = math.nan
    y = rope(x, positions, table, interleaved=interleaved)
    assert y[1, 0, [6, partner]].isnan().all()
    y[1, 0, [6, partner]] = clean[1, 0, [6, partner]]
    assert torch.equal(y, clean)


def expected_row(position, dim, base, frequency_of):
    angles = [position * frequency_of(i, base ** (-2 * i / dim)) for i in range(dim // 2)]
    row = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    return torch.tensor(row, dtype=torch.float64)


@pytest.mark.parametrize(("dim", "base"), [(2, 10000.0), (64, 10000.0), (128, 500000.0)])
def test_table_is_exact_to_float32_at_the_latest_position(dim, base, device):
    table = rope_cos_sin(MAX_POSITION, dim, base=base, device=device)
    assert (table.dtype, table.shape) == (torch.float32, (MAX_POSITION, dim))
    for position in (0, 1, 4097, MAX_POSITION - 1):
        want = expected_row(position, dim, base, lambda i, f: f)
        torch.testing.assert_close(table[position].cpu().double(), want, rtol=0, atol=2**-24)


def test_yarn_keeps_pairs_0_to_10_slows_23_to_31_and_ramps_between(device):
    """The figures of every DeepSeek release: base 10000, 64 channels, 4096 positions times 40."""

    def frequency(i, f):
        slowed = min(max((i - 10) / 13, 0), 1)
        return f * (1 - slowed) + f / 40 * slowed

    table = rope_cos_sin(MAX_POSITION, 64, scaling=V3, device=device)
    for position in (0, 1, 4097, MAX_POSITION - 1):
        want = expected_row(position, 64, 10000.0, frequency)
        torch.testing.assert_close(table[position].cpu().double(), want, rtol=0, atol=2**-24)


@pytest.mark.parametrize("mscales", [(None, None), (1.0, 1.0), (0.707, 0.707), (0.5, 1.5)])
@pytest.mark.parametrize(
    ("dim", "base", "original", "factor", "betas"),
    [
        (64, 10000.0, 4096, 40.0, (32, 1)),
        (8, 10000.0, 64, 4.0, (32, 1)),
        (16, 10000.0, 128, 2.5, (32, 1)),
        (2, 10000.0, 4096, 40.0, (32, 1)),
        (128, 500000.0, 8192, 8.0, (16, 2)),
        (32, 100.0, 256, 40.0, (3, 3)),
        (8, 10000.0, 65536, 4.0, (32, 1)),  # the ramp ends behind the last pair
        (8, 100.0, 65536, 4.0, (3000, 1)),  # and where it is cut off
    ],
)
def test_table_agrees_with_transformers(dim, base, original, factor, betas, mscales):
    parameters = {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": betas[0],
        "beta_slow": betas[1],
    }
    if mscales[0] is not None:
        parameters |= {"mscale": mscales[0], "mscale_all_dim": mscales[1]}
    config = DeepseekV3Config(
        qk_rope_head_dim=dim, head_dim=dim, rope_parameters=parameters, max_position_embeddings=int(original * factor)
    )
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    scaling = YarnScaling(factor, original, *betas, *mscales)
    torch.testing.assert_close(scaling.inverse_frequencies(dim, base).float(), frequencies, rtol=1e-6, atol=0)
    assert scaling.cos_sin_factor() == pytest.approx(attention_factor, rel=1e-12)
    angles = torch.arange(50, dtype=torch.float64)[:, None] * frequencies.double()
    want = torch.cat((angles.cos(), angles.sin()), -1) * attention_factor
    got = rope_cos_sin(50, dim, base=base, scaling=scaling).double()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("scaling", "softmax", "table"),
    [
        (V3, 1.873854, 1.0),
        (V2, 1.589626, 1.0),
        (YarnScaling(40, 4096), 1.0, 1.368888),
        (YarnScaling(40, 4096, mscale=1.0, mscale_all_dim=0.0), 1.0, 1.368888),
        (YarnScaling(40, 4096, mscale=0.707, mscale_all_dim=1.0), 1.873854, 1.260804 / 1.368888),
        (YarnScaling(1, 4096, mscale=1.0, mscale_all_dim=1.0), 1.0, 1.0),
        (YarnScaling(0.5, 4096), 1.0, 1.0),
    ],
)
def test_attention_temperature(scaling, softmax, table):
    assert scaling.softmax_scale_factor() == pytest.approx(softmax, abs=1e-6)
    assert scaling.cos_sin_factor() == pytest.approx(table, abs=1e-6)
    assert rope_cos_sin(1, 64, scaling=scaling)[0, 0].item() == pytest.approx(table, abs=1e-6)


def test_softmax_scale_of_the_releases():
    assert 192**-0.5 * V3.softmax_scale_factor() == pytest.approx(0.135234, abs=1e-6)
    assert 192**-0.5 * V2.softmax_scale_factor() == pytest.approx(0.114721, abs=1e-6)


@pytest.mark.parametrize("dim", [2, 4, 8, 64])
@pytest.mark.parametrize("original", [1, 6, 7, 128, 4096, 2**40])
def test_ramp_is_between_kept_and_slowed_and_never_rises(dim, original):
    """Also where the ramp has no width, or lies outside the pairs."""
    plain = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    ratio = YarnScaling(40, original).inverse_frequencies(dim, 10000.0) / plain
    assert ((ratio >= 1 / 40 - 1e-12) & (ratio <= 1 + 1e-12)).all()
    assert (ratio.diff() <= 1e-12).all()
    assert original < 2**40 or (ratio == 1).all()


def test_a_ramp_without_width_is_a_step():
    """An original context in which no pair turns once: the ramp begins and ends at pair 0."""
    frequencies = YarnScaling(4, 6).inverse_frequencies(8, 10000.0)
    torch.testing.assert_close(frequencies, torch.tensor([1, 0.1 / 4, 0.01 / 4, 0.001 / 4], dtype=torch.float64))


def test_an_empty_table_can_be_made():
    assert rope_cos_sin(0, 64).shape == (0, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rope_cos_sin(-1, 64), "rope_cos_sin: max_position must be 0 or more, got -1"),
        (lambda: rope_cos_sin(8, 63), "rope_cos_sin: dim must be positive and even, got 63"),
        (lambda: rope_cos_sin(8, 0), "rope_cos_sin: dim must be positive and even, got 0"),
        (lambda: rope_cos_sin(8, 64, base=1.0), "rope_cos_sin: base must be above 1 and finite, got 1.0"),
        (lambda: YarnScaling(0, 4096), "YarnScaling: factor must be positive and finite, got 0"),
        (lambda: YarnScaling(math.nan, 4096), "YarnScaling: factor must be positive and finite, got nan"),
        (lambda: YarnScaling(40, 0), "YarnScaling: original_max_position_embeddings must be positive, got 0"),
        (lambda: YarnScaling(40, 4096, 1, 32), r"YarnScaling: beta_slow must be in \(0, beta_fast\], got 32"),
    ],
)
def test_bad_parameters_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
