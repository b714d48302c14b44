"""SwiGLU's activation against the formula in float64, and the quantizing one against the separate ops."""

import math

import pytest
import torch

from deepseek_ops import per_token_cast_to_fp8, silu_mul, silu_mul_cast_to_fp8
from tests.support import Guarded, assert_rounded_once, assert_same

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def true_silu_mul(x):
    gate, up = x.double().chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def inputs(m, d, dtype, device):
    """Gates spread over [-80, 80], most of them near zero."""
    x = torch.randn(m, 2 * d)
    x[:, :d] *= torch.tensor([1.0, 4.0, 20.0])[torch.arange(m) % 3][:, None]
    return x.clamp(-80, 80).to(device, dtype)


@pytest.mark.parametrize("d", [1, 2, 127, 128, 129, 1408, 2048])
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_formula_rounded_once(dtype, d, device):
    x = inputs(7, d, dtype, device)
    y = silu_mul(x)
    assert y.dtype == dtype
    assert_rounded_once(y, true_silu_mul(x))


@pytest.mark.parametrize("d", [1, 7, 8, 127, 128, 136, 512, 576, 2056])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 7, 31, 33, 129, 1100])
def test_every_edge_is_the_formula_and_quantizes_like_the_separate_ops(m, d, device):
    x = inputs(m, d, DTYPES[(m + d) % 3], device)
    y = silu_mul(x)
    assert_rounded_once(y, true_silu_mul(x))
    for use_ue8m0, mn_major in ((False, True), (True, False)):
        got = silu_mul_cast_to_fp8(x, use_ue8m0=use_ue8m0, mn_major=mn_major)
        for g, w in zip(got, per_token_cast_to_fp8(y, use_ue8m0=use_ue8m0, mn_major=mn_major), strict=True):
            assert_same(g, w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_gate_is_the_formula_rounded_once(dtype, device):
    """All finite gates there are: exp overflows, underflows and meets subnormals among them."""
    gates = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    gates = gates[gates.isfinite() & (gates >= -85)].to(device)
    gates = gates[: gates.numel() // 8 * 8].view(8, -1)
    x = torch.cat((gates, torch.ones_like(gates)), -1)
    assert_rounded_once(silu_mul(x), true_silu_mul(x))


@pytest.mark.parametrize(("m", "d", "stride"), [(5, 300, 601), (33, 128, 264), (7, 512, 1024), (9, 8, 17)])
def test_values_beside_the_rows_count_for_nothing(m, d, stride, device):
    guarded = Guarded((m, 2 * d), torch.bfloat16, device, (stride, 1))
    x = inputs(m, d, torch.bfloat16, device)
    guarded.tensor.copy_(x)
    for got, want in zip(
        (silu_mul(guarded.tensor), *silu_mul_cast_to_fp8(guarded.tensor)),
        (silu_mul(x), *silu_mul_cast_to_fp8(x)),
        strict=True,
    ):
        assert_same(got, want)
    guarded.assert_intact()


@pytest.mark.parametrize("mn_major", [False, True])
def test_leading_dimensions_of_any_strides_give_the_bits_of_contiguous_ones(mn_major, device):
    x = torch.randn(3, 4, 5, 528, device=device).bfloat16()
    for view in (x, x.transpose(0, 1), x[:, ::2], x[..., 1:3, 8:520], x[1:2, :, :1], x.transpose(0, 2), x[..., 1:401]):
        dense = view.contiguous()
        assert_same(silu_mul(view), silu_mul(dense))
        got, want = (silu_mul_cast_to_fp8(y, mn_major=mn_major) for y in (view, dense))
        for g, w in zip(got, want, strict=True):
            assert_same(g, w)


def test_first_half_is_the_gate(device):
    x = torch.tensor([[0.0, -50.0, 50.0, 3.0, 5.0, 7.0]], device=device)
    gate_0, gate_low, gate_high = silu_mul(x)[0].tolist()
    assert gate_0 == 0
    assert -1e-18 < gate_low < 0
    assert gate_high == 50 * 7


@pytest.mark.parametrize(("use_ue8m0", "mn_major"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(5, 256), (1, 600), (2, 3, 512), (6, 4096), (0, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizing_gives_the_bits_of_the_separate_ops(dtype, shape, use_ue8m0, mn_major, device):
    x = inputs(math.prod(shape[:-1]), shape[-1] // 2, dtype, device).view(shape)
    layout = {"use_ue8m0": use_ue8m0, "mn_major": mn_major}
    want = per_token_cast_to_fp8(silu_mul(x), **layout)
    for got, wanted in zip(silu_mul_cast_to_fp8(x, **layout), want, strict=True):
        assert_same(got, wanted)


def test_zero_blocks_get_the_smallest_scale(device):
    x = torch.zeros(2, 512, device=device).bfloat16()
    x[1, :128] = 8.0
    x[1, 256:384] = 2.0
    q, sf = silu_mul_cast_to_fp8(x)
    floor = torch.tensor(1e-4, dtype=torch.float32) / 448
    assert (sf[0] == floor).all()
    assert sf[1, 1] == floor
    assert not q[0].float().any()
    assert not q[1, 128:].float().any()
    assert (q[1, :128].float() == 448).all()


@pytest.mark.parametrize(
    ("gate", "up", "wanted"),
    [
        (math.nan, 1.0, math.nan),
        (1.0, math.nan, math.nan),
        (math.inf, 2.0, math.inf),
        (math.inf, -2.0, -math.inf),
        (-math.inf, 2.0, math.nan),
        (0.0, math.inf, math.nan),
        (-200.0, 3.0, 0.0),
        (3e38, 3e38, math.inf),
    ],
)
def test_extreme_values_stay_in_their_channel(gate, up, wanted, device):
    x = inputs(3, 200, torch.float32, device)
    clean = silu_mul(x)
    x[1, 5], x[1, 205] = gate, up
    y = silu_mul(x)
    torch.testing.assert_close(y[1, 5].item(), wanted, rtol=0, atol=0, equal_nan=True)
    y[1, 5] = clean[1, 5]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("shape", [(640,), (0, 640), (2, 0, 640), (2, 3, 640), (4, 0)])
def test_takes_any_shape(shape, device):
    x = torch.randn(shape, device=device).bfloat16()
    y = silu_mul(x)
    assert y.shape == (*shape[:-1], shape[-1] // 2)
    assert torch.equal(y.flatten(), silu_mul(x.reshape(math.prod(shape[:-1]), shape[-1])).flatten())


def test_strided_rows_give_the_bits_of_contiguous_ones(device):
    wide = torch.randn(8, 1000, device=device).bfloat16()
    for x in (wide[:4, :600], wide[::2, 3:603], wide[:1, 400:].expand(4, 600)):
        got = (silu_mul(x), *silu_mul_cast_to_fp8(x))
        want = (silu_mul(x.contiguous()), *silu_mul_cast_to_fp8(x.contiguous()))
        for g, w in zip(got, want, strict=True):
            assert_same(g, w)
    swapped = torch.randn(3, 4, 600, device=device).transpose(0, 1)
    assert_same(silu_mul(swapped), silu_mul(swapped.contiguous()))
