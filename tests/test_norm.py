"""The norms against the formula in float64, and the fused ones against what they replace."""

import math

import pytest
import torch

from deepseek_ops import (
    add_rms_norm,
    add_rms_norm_cast_to_fp8,
    per_token_cast_to_fp8,
    rms_norm,
    rms_norm_cast_to_fp8,
)
from tests.support import Guarded, assert_rounded_once, assert_same

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WIDTHS = [1, 2, 127, 128, 129, 512, 576, 1536, 7168]
LAYOUTS = [(False, False), (True, False), (False, True), (True, True)]


def true_norm(x, weight, eps):
    x, weight = x.double(), weight.double()
    return torch.stack([row / math.sqrt(float(row @ row) / x.shape[-1] + eps) for row in x]) * weight


def rows(m, d, dtype, device):
    """Rows of magnitudes from 1e-3, where eps = 1e-6 weighs as much as the squares, to 1e4."""
    scale = torch.tensor([1.0, 1e-3, 1e4, 30.0, 0.1])[torch.arange(m) % 5]
    return (torch.randn(m, d) * scale[:, None]).to(device, dtype)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("weight_is_float", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_the_formula_rounded_once(dtype, weight_is_float, d, device):
    x = rows(6, d, dtype, device)
    weight = (torch.randn(d) * 2).to(device, torch.float32 if weight_is_float else dtype)
    y = rms_norm(x, weight)
    assert y.dtype == dtype
    assert_rounded_once(y, true_norm(x, weight, 1e-6))


@pytest.mark.parametrize(
    "d", [1, 7, 8, 16, 127, 128, 129, 136, 256, 264, 512, 576, 1536, 2048, 4096, 4104, 7168, 16384, 16392, 40000]
)
@pytest.mark.parametrize("m", [0, 1, 3, 33])
def test_every_edge_is_the_formula_and_quantizes_like_the_separate_ops(m, d, device):
    """Widths on both sides of each change in how a row is divided among threads."""
    dtype = DTYPES[(m + d) % 3]
    x, residual = rows(m, d, dtype, device), rows(m, d, dtype, device).flip(0)
    weight = torch.randn(d, device=device).to(torch.float32 if m % 2 else dtype)
    y, total = add_rms_norm(x, residual, weight)
    assert_rounded_once(total, x.double() + residual.double())
    if m:
        assert_rounded_once(y, true_norm(total, weight, 1e-6))
    assert_same(rms_norm(total, weight), y)
    for use_ue8m0, mn_major in ((False, True), (True, False)):
        layout = {"use_ue8m0": use_ue8m0, "mn_major": mn_major}
        want = (*per_token_cast_to_fp8(y, **layout), total)
        for g, w in zip(add_rms_norm_cast_to_fp8(x, residual, weight, **layout), want, strict=True):
            assert_same(g, w)
        for g, w in zip(rms_norm_cast_to_fp8(total, weight, **layout), want[:2], strict=True):
            assert_same(g, w)


@pytest.mark.parametrize("d", [8, 129, 512, 1536, 7168])
def test_a_row_s_bits_do_not_depend_on_the_rows_beside_it(d, device):
    x, weight = rows(2200, d, torch.bfloat16, device), torch.randn(d, device=device)
    y = rms_norm(x, weight)
    for rows_alone in (slice(0, 1), slice(7, 9), slice(2190, 2200)):
        assert_same(rms_norm(x[rows_alone].clone(), weight), y[rows_alone])


@pytest.mark.parametrize(("m", "d", "stride"), [(5, 300, 301), (33, 128, 136), (7, 512, 520), (9, 8, 9)])
def test_values_beside_the_rows_count_for_nothing(m, d, stride, device):
    guarded = Guarded((m, d), torch.bfloat16, device, (stride, 1))
    x, weight = rows(m, d, torch.bfloat16, device), torch.randn(d, device=device)
    guarded.tensor.copy_(x)
    for got, want in zip(
        (*add_rms_norm(guarded.tensor, guarded.tensor, weight), *rms_norm_cast_to_fp8(guarded.tensor, weight)),
        (*add_rms_norm(x, x, weight), *rms_norm_cast_to_fp8(x, weight)),
        strict=True,
    ):
        assert_same(got, want)
    guarded.assert_intact()


def test_a_weight_that_is_not_aligned_changes_no_bit(device):
    x, wide = rows(5, 512, torch.bfloat16, device), torch.randn(513, device=device)
    assert_same(rms_norm(x, wide[1:]), rms_norm(x, wide[1:].clone()))


@pytest.mark.parametrize("mn_major", [False, True])
def test_leading_dimensions_of_any_strides_give_the_bits_of_contiguous_ones(mn_major, device):
    x, weight = torch.randn(3, 4, 5, 264, device=device).bfloat16(), torch.randn(264, device=device)
    for view in (x, x.transpose(0, 1), x[:, ::2], x[..., 1:3, :], x[1:2, :, :1], x.transpose(0, 2)):
        dense = view.contiguous()
        for residual in (view, dense):
            got = add_rms_norm_cast_to_fp8(view, residual, weight, mn_major=mn_major)
            want = add_rms_norm_cast_to_fp8(dense, dense, weight, mn_major=mn_major)
            for g, w in zip(got, want, strict=True):
                assert_same(g, w)


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-5, 0.5])
def test_eps_is_added_to_the_mean_of_the_squares(eps, device):
    x, weight = rows(6, 640, torch.float32, device), torch.ones(640, device=device)
    assert_rounded_once(rms_norm(x, weight, eps=eps), true_norm(x, weight, eps))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_in_float32_changes_no_bit_if_it_has_the_same_values(dtype, device):
    x, weight = rows(5, 300, dtype, device), torch.randn(300, device=device).to(dtype)
    assert_same(rms_norm(x, weight.float()), rms_norm(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 129, 7168])
def test_sum_is_rounded_before_it_is_normed(d, dtype, device):
    x, residual = rows(6, d, dtype, device), rows(6, d, dtype, device).flip(0) * 3
    weight = torch.randn(d, device=device).to(dtype)
    y, residual_out = add_rms_norm(x, residual, weight)
    total = x.double() + residual.double()
    assert_rounded_once(residual_out, total)
    assert_same(y, rms_norm(residual_out, weight))
    assert_rounded_once(y, true_norm(residual_out, weight, 1e-6))


def test_norm_of_the_unrounded_sum_would_be_another(device):
    """What the test above relies on: in bfloat16 the rounding of the sum is visible."""
    x, residual = rows(6, 576, torch.bfloat16, device), rows(6, 576, torch.bfloat16, device)
    weight = torch.ones(576, device=device)
    unrounded = rms_norm(x.float() + residual.float(), weight).bfloat16()
    assert not torch.equal(unrounded, add_rms_norm(x, residual, weight)[0])


@pytest.mark.parametrize(("use_ue8m0", "mn_major"), LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 128), (1, 300), (2, 3, 576), (6, 7168), (0, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizing_norms_give_the_bits_of_the_separate_ops(dtype, shape, use_ue8m0, mn_major, device):
    x = rows(math.prod(shape[:-1]), shape[-1], dtype, device).view(shape)
    residual, weight = x.flip(-1) * 0.3, torch.randn(shape[-1], device=device).to(dtype)
    layout = {"use_ue8m0": use_ue8m0, "mn_major": mn_major}

    want = per_token_cast_to_fp8(rms_norm(x, weight, eps=1e-5), **layout)
    for got, wanted in zip(rms_norm_cast_to_fp8(x, weight, eps=1e-5, **layout), want, strict=True):
        assert_same(got, wanted)

    y, residual_out = add_rms_norm(x, residual, weight, eps=1e-5)
    want = (*per_token_cast_to_fp8(y, **layout), residual_out)
    for got, wanted in zip(add_rms_norm_cast_to_fp8(x, residual, weight, eps=1e-5, **layout), want, strict=True):
        assert_same(got, wanted)


def test_zero_rows_stay_zero_and_get_the_smallest_scale(device):
    x, weight = torch.zeros(3, 256, device=device).bfloat16(), torch.ones(256, device=device)
    x[1] = -0.0
    x[2, 128:] = 1.0
    assert not rms_norm(x, weight)[:2].any()
    q, sf = rms_norm_cast_to_fp8(x, weight)
    assert not q[:2].float().any()
    assert (sf[:2] == torch.tensor(1e-4, dtype=torch.float32) / 448).all()
    assert sf[2, 0] == sf[0, 0]
    assert not q[2, :128].float().any()
    assert (q[2, 128:].float() == 448).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(value, device):
    x, weight = rows(5, 300, torch.bfloat16, device), torch.rand(300, device=device) + 0.5
    residual = rows(5, 300, torch.bfloat16, device)
    clean_y, clean_residual = add_rms_norm(x, residual, weight)
    x[2, 7] = value
    y, residual_out = add_rms_norm(x, residual, weight)
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], clean_y[others])
    assert torch.equal(residual_out[others], clean_residual[others])
    assert y[2, 7].isnan()
    rest = torch.cat((y[2, :7], y[2, 8:]))
    assert rest.isnan().all() if math.isnan(value) else not rest.any()


def test_squares_beyond_float32_turn_the_row_into_zeros(device):
    x = torch.full((2, 128), 1e25, device=device).bfloat16()
    x[1] = 1e18
    y = rms_norm(x, torch.ones(128, device=device))
    assert not y[0].any()
    assert (y[1] == 1).all()


@pytest.mark.parametrize("shape", [(640,), (0, 640), (2, 0, 640), (2, 3, 640), (1, 1, 1, 640), (4, 0)])
def test_takes_any_shape(shape, device):
    x, weight = torch.randn(shape, device=device).bfloat16(), torch.randn(shape[-1], device=device)
    y, residual_out = add_rms_norm(x, x, weight)
    assert y.shape == residual_out.shape == rms_norm(x, weight).shape == shape
    flat = x.reshape(math.prod(shape[:-1]), shape[-1])
    assert torch.equal(rms_norm(x, weight).view(flat.shape), rms_norm(flat, weight))


def test_strided_rows_give_the_bits_of_contiguous_ones(device):
    wide = torch.randn(8, 1000, device=device).bfloat16()
    residual, weight = torch.randn(1, 576, device=device).bfloat16().expand(4, 576), torch.randn(576, device=device)
    strided = [wide[:4, :576], wide[::2, 3:579], wide[:4, 424:], wide[:1, :576].expand(4, 576)]
    for x in strided:
        got = (*add_rms_norm(x, residual, weight), *add_rms_norm_cast_to_fp8(x, residual, weight))
        dense = x.contiguous(), residual.contiguous(), weight
        want = (*add_rms_norm(*dense), *add_rms_norm_cast_to_fp8(*dense))
        for g, w in zip(got, want, strict=True):
            assert_same(g, w)
    swapped = torch.randn(3, 4, 576, device=device).transpose(0, 1)
    assert_same(rms_norm(swapped, weight), rms_norm(swapped.contiguous(), weight))
    sums = add_rms_norm(swapped, swapped, weight), add_rms_norm(swapped.contiguous(), swapped, weight)
    for got, want in zip(*sums, strict=True):
        assert_same(got, want)
        assert got.is_contiguous()
