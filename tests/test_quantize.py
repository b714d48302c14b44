"""Quantization: what the scales are, how values round, and that nothing but the output is written."""

import math

import pytest
import torch

import deepseek_ops as ops
from tests.support import Guarded, assert_rows_close, bits

E4M3 = torch.float8_e4m3fn
SHAPES = [(1, 1), (1, 127), (2, 128), (3, 129), (5, 300), (64, 7168), (129, 576), (1, 16384), (0, 128), (4, 0)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def blockwise(x):
    """The blocks of `[m, k]` by plain slicing: an independent way to walk them."""
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], 128):
            yield row, start // 128, slice(start, start + 128)


def wide_random(m, k, dtype=torch.float32):
    """Random values whose magnitude differs from block to block, so that a neighbour's scale would be wrong."""
    magnitude = 2.0 ** torch.randint(-8, 8, (m, math.ceil(k / 128)))
    return (torch.randn(m, k) * magnitude.repeat_interleave(128, 1)[:, :k]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_scale_is_the_largest_magnitude_over_448(shape, dtype, device):
    x = wide_random(*shape, dtype)
    q, sf = ops.per_token_cast_to_fp8(x.to(device))
    assert q.shape == shape
    assert q.dtype == E4M3
    for row, block, columns in blockwise(x):
        amax = max(x[row, columns].double().abs().max().item(), 1e-4)
        assert sf[row, block].item() == pytest.approx(amax / 448, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_round_to_the_nearest_e4m3(shape, dtype, device):
    x = wide_random(*shape, dtype)
    q, sf = ops.per_token_cast_to_fp8(x.to(device))
    # Half a unit in the last place of e4m3, and what float32 adds; below the normals the unit is 2^-9.
    x, scale = x.double(), sf.cpu().double().repeat_interleave(128, 1)[:, : shape[1]]
    error = (q.cpu().double() * scale - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, scale * 2.0**-10) * (1 + 1e-5)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ue8m0_scales_are_the_next_powers_of_two(shape, device):
    x = wide_random(*shape)
    _, plain = ops.per_token_cast_to_fp8(x.to(device))
    _, sf = ops.per_token_cast_to_fp8(x.to(device), use_ue8m0=True)
    for want, got in zip(plain.flatten().tolist(), sf.flatten().tolist(), strict=True):
        assert got == 2.0 ** math.ceil(math.log2(want) - 1e-9)


def test_a_scale_that_is_a_power_of_two_stays_itself(device):
    x = torch.full((9, 128), 448.0, device=device) * 2.0 ** torch.arange(-4, 5, device=device).unsqueeze(1)
    plain, rounded = (ops.per_token_cast_to_fp8(x, use_ue8m0=ue8m0)[1] for ue8m0 in (False, True))
    assert torch.equal(plain, rounded)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 63, 64, 130])
def test_mn_major_scales_are_the_same_numbers_in_tma_layout(m, device):
    x = wide_random(m, 520).to(device)
    q, sf = ops.per_token_cast_to_fp8(x)
    q_mn, sf_mn = ops.per_token_cast_to_fp8(x, mn_major=True)
    assert torch.equal(bits(q), bits(q_mn))
    assert torch.equal(sf, sf_mn)
    assert sf_mn.stride() == (1, (m + 3) // 4 * 4)
    assert ops.to_mn_major_tma_aligned(sf).stride() == sf_mn.stride()
    assert torch.equal(ops.to_mn_major_tma_aligned(sf), sf)


@pytest.mark.parametrize("mn_major", [False, True])
def test_groups_are_quantized_each_by_itself(mn_major, device):
    x = wide_random(3 * 5, 300).view(3, 5, 300).to(device)
    q, sf = ops.per_token_cast_to_fp8(x, mn_major=mn_major)
    for group in range(3):
        q_alone, sf_alone = ops.per_token_cast_to_fp8(x[group], mn_major=mn_major)
        assert torch.equal(bits(q[group]), bits(q_alone))
        assert torch.equal(sf[group], sf_alone)


@pytest.mark.parametrize("columns", [slice(0, 256), slice(8, 264), slice(1, 257), slice(3, 130)], ids=str)
@pytest.mark.parametrize("rows", [slice(None), slice(None, None, 2), slice(5, 6)], ids=str)
def test_reads_rows_of_a_wider_buffer(rows, columns, device):
    wide = wide_random(9, 300, torch.bfloat16).to(device)
    view = wide[rows, columns]
    for got, want in zip(ops.per_token_cast_to_fp8(view), ops.per_token_cast_to_fp8(view.clone()), strict=True):
        assert torch.equal(bits(got), bits(want))


def test_a_kernel_gives_the_references_bits(device):
    for dtype in DTYPES:
        for shape in SHAPES:
            for use_ue8m0 in (False, True):
                x = wide_random(*shape, dtype)
                got = ops.per_token_cast_to_fp8(x.to(device), use_ue8m0=use_ue8m0)
                want = ops.per_token_cast_to_fp8(x, use_ue8m0=use_ue8m0)
                assert torch.equal(bits(got[0]).cpu(), bits(want[0]))
                assert torch.equal(got[1].cpu(), want[1])


EDGES_M = [0, 1, 2, 3, 4, 5, 7, 31, 33, 129]
EDGES_K = [1, 7, 8, 16, 127, 128, 129, 136, 512, 576, 1536, 7168]


def edge_values(m, k, dtype):
    """Random blocks with all that is not ordinary among them: NaN, infinities, values beyond FP8, dust, zeros."""
    x = wide_random(m, k, dtype)
    special = [math.nan, math.inf, -math.inf, 449.0, -3e4, 2.0**-14, 0.0, -0.0]  # a NaN's sign is not promised
    for i, value in enumerate(special):
        if m * k > 64 * (i + 1):
            x.view(-1)[torch.randint(m * k, (1 + m * k // 5000,))] = value
    return x


@pytest.mark.parametrize("k", EDGES_K)
@pytest.mark.parametrize("m", EDGES_M)
def test_every_edge_gives_the_bits_of_the_formula_on_the_cpu(m, k, device):
    """On a GPU: the kernel against the reference. Bits are promised, so bits are compared."""
    x = edge_values(m, k, DTYPES[(m + k) % 3])
    layouts = [(ue8m0, mn_major) for ue8m0 in (False, True) for mn_major in (False, True)]
    for ue8m0, mn_major in layouts:
        for floor in (1e-4, 1e-30):
            options = {"use_ue8m0": ue8m0, "mn_major": mn_major, "amax_floor": floor}
            got, want = (ops.per_token_cast_to_fp8(y, **options) for y in (x.to(device), x))
            for g, w in zip(got, want, strict=True):
                assert g.stride() == w.stride()
                assert torch.equal(bits(g).cpu(), bits(w))
            block_options = {"use_ue8m0": ue8m0, "amax_floor": floor}
            got, want = (ops.per_block_cast_to_fp8(y, **block_options) for y in (x.to(device), x))
            for g, w in zip(got, want, strict=True):
                assert torch.equal(bits(g).cpu(), bits(w))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4, 33, 700, 4099])
def test_large_tensors_give_the_bits_of_the_formula_on_the_cpu(m, dtype, device):
    """Large enough that a GPU's every way to divide the work is taken."""
    x = wide_random(m, 1160, dtype)
    for mn_major in (False, True):
        got, want = (ops.per_token_cast_to_fp8(y, mn_major=mn_major) for y in (x.to(device), x))
        assert torch.equal(bits(got[0]).cpu(), bits(want[0]))
        assert torch.equal(got[1].cpu(), want[1])
    got, want = (ops.per_block_cast_to_fp8(y) for y in (x.to(device), x))
    assert torch.equal(bits(got[0]).cpu(), bits(want[0]))
    assert torch.equal(got[1].cpu(), want[1])


@pytest.mark.parametrize("mn_major", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "stride"), [(5, 300, 301), (33, 128, 129), (7, 512, 520), (130, 136, 144), (9, 8, 9)]
)
def test_values_beside_the_rows_count_for_nothing(m, k, stride, mn_major, device):
    """What lies between and around the rows is poison: a scale that saw it would be NaN or huge."""
    guarded = Guarded((m, k), torch.bfloat16, device, (stride, 1))
    x = wide_random(m, k, torch.bfloat16)
    guarded.tensor.copy_(x)
    for got, want in zip(
        (*ops.per_token_cast_to_fp8(guarded.tensor, mn_major=mn_major), *ops.per_block_cast_to_fp8(guarded.tensor)),
        (*ops.per_token_cast_to_fp8(x, mn_major=mn_major), *ops.per_block_cast_to_fp8(x)),
        strict=True,
    ):
        assert torch.equal(bits(got).cpu(), bits(want))
    guarded.assert_intact()


@pytest.mark.parametrize("mn_major", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 300), (4, 1, 512), (1, 7, 136), (70, 2, 128), (2, 0, 128), (0, 3, 128)])
def test_groups_of_any_strides_give_the_bits_of_contiguous_ones(shape, mn_major, device):
    groups, m, k = shape
    wide = wide_random(max(groups, 1) * max(m, 1) * 2, k + 24, torch.bfloat16).to(device)
    wide = wide.view(max(groups, 1), max(m, 1) * 2, k + 24)
    for x in (wide[:groups, :m, :k], wide[:groups, : 2 * m : 2, 8 : k + 8], wide[:groups, m : 2 * m, 3 : k + 3]):
        got = (*ops.per_token_cast_to_fp8(x, mn_major=mn_major), *ops.per_block_cast_to_fp8(x))
        dense = x.cpu().contiguous()
        want = (*ops.per_token_cast_to_fp8(dense, mn_major=mn_major), *ops.per_block_cast_to_fp8(dense))
        for g, w in zip(got, want, strict=True):
            assert g.stride() == w.stride()
            assert torch.equal(bits(g).cpu(), bits(w))


def test_weight_blocks_take_any_leading_dimensions(device):
    w = wide_random(2 * 3 * 4 * 130, 136).view(2, 3, 4, 130, 136).to(device)
    for x in (w, w.transpose(0, 2), w[:, :, :, 1:129], w.transpose(0, 1)[:, :, 1:3]):
        for got, want in zip(ops.per_block_cast_to_fp8(x), ops.per_block_cast_to_fp8(x.cpu()), strict=True):
            assert torch.equal(bits(got).cpu(), bits(want))


@pytest.mark.parametrize("cast", [ops.per_token_cast_to_fp8, ops.per_block_cast_to_fp8])
def test_blocks_of_zeros_and_dust_stay_finite_and_exact(cast, device):
    x = torch.randn(4, 512, device=device)
    x[:, :128], x[:, 128:256], x[:, 256:384] = 0.0, -0.0, 2.0**-121
    q, sf = cast(x)
    assert sf.isfinite().all()
    assert (sf > 0).all()
    assert (q.float()[:, :384] == 0).all()


@pytest.mark.parametrize("value", [440.0, 448.0, 449.0, 463.0, 464.0, 465.0, 480.0, 1e4, 3e38, math.inf])
@pytest.mark.parametrize("sign", [1, -1])
def test_finite_values_never_become_nan(value, sign, device):
    x = torch.full((1, 8), sign * value, device=device)
    assert ops.cast_to_fp8(x).float().tolist() == [[sign * 448.0] * 8]
    q, sf = ops.per_token_cast_to_fp8(x)
    assert not q.float().isnan().any()
    back = ops.per_token_cast_from_fp8(q, sf, out_dtype=torch.float32)
    finite = min(value, torch.finfo(torch.float32).max)
    assert back[0, 0].item() == pytest.approx(sign * finite, rel=1e-6)


def test_nan_stays_where_it_is(device):
    x = torch.randn(4, 256, device=device)
    clean_q, clean_sf = ops.per_token_cast_to_fp8(x)
    place = (x.abs() < x.abs().amax(-1, keepdim=True) / 2).nonzero()[0]  # not the block's largest: scales stay
    x[tuple(place)] = math.nan
    q, sf = ops.per_token_cast_to_fp8(x)
    assert q.float().isnan().nonzero().tolist() == [place.tolist()]
    assert torch.equal(sf, clean_sf)
    q[tuple(place)] = clean_q[tuple(place)]
    assert torch.equal(bits(q), bits(clean_q))


def test_an_infinity_counts_as_the_largest_float(device):
    x = torch.randn(2, 256, device=device)
    x[0, 3] = -math.inf
    q, sf = ops.per_token_cast_to_fp8(x)
    assert sf.isfinite().all()
    assert q[0, 3].item() == -448
    assert (q[0, :128].float() == 0).sum() == 127
    assert torch.equal(bits(q[1]), bits(ops.per_token_cast_to_fp8(x[1:])[0][0]))


def test_a_small_floor_keeps_small_gradients(device):
    x = torch.randn(3, 256, device=device) * 1e-8
    q, sf = ops.per_token_cast_to_fp8(x, amax_floor=1e-30)
    assert_rows_close(ops.per_token_cast_from_fp8(q, sf, out_dtype=torch.float32), x, 0.05)
    assert (ops.per_token_cast_to_fp8(x)[0].float() == 0).any(), "the default floor flushes what is this small"


@pytest.mark.parametrize("n", [1, 64, 127, 128, 129, 576])
@pytest.mark.parametrize("k", [8, 128, 200])
def test_weight_blocks_are_128_by_128_and_ragged_at_the_edges(n, k, device):
    w = torch.randn(n, k) * 2.0 ** torch.randint(-6, 6, (math.ceil(n / 128),)).repeat_interleave(128)[:n, None]
    q, sf = ops.per_block_cast_to_fp8(w.to(device))
    assert sf.shape == (math.ceil(n / 128), math.ceil(k / 128))
    for i in range(0, n, 128):
        for j in range(0, k, 128):
            block = w[i : i + 128, j : j + 128]
            assert sf[i // 128, j // 128].item() == pytest.approx(block.abs().max().item() / 448, rel=1e-6)
    back = ops.per_block_cast_from_fp8(q, sf, out_dtype=torch.float32).cpu()
    limit = torch.maximum(w.abs() / 16, sf.cpu().repeat_interleave(128, 0)[:n, :1] * 2.0**-10) if k <= 128 else None
    if limit is not None:
        assert ((back - w).abs() <= limit * (1 + 1e-5)).all()


def test_weights_of_experts_are_quantized_each_by_itself(device):
    w = torch.randn(3, 200, 136, device=device)
    q, sf = ops.per_block_cast_to_fp8(w)
    for expert in range(3):
        q_alone, sf_alone = ops.per_block_cast_to_fp8(w[expert])
        assert torch.equal(bits(q[expert]), bits(q_alone))
        assert torch.equal(sf[expert], sf_alone)


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_casting_back_multiplies_and_rounds_once(out_dtype, device):
    q, sf = ops.per_token_cast_to_fp8(torch.randn(3, 300, device=device))
    spread = sf.double()[:, torch.arange(300, device=device) // 128]
    want = (q.double() * spread).to(torch.float32).to(out_dtype)
    assert torch.equal(ops.per_token_cast_from_fp8(q, sf, out_dtype=out_dtype), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mn_major", [False, True])
def test_more_than_two_to_the_31_elements(mn_major):
    m, k = 300_000, 7168
    x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16).expand(m, k).contiguous()
    x[-256:] *= 3
    q, sf = ops.per_token_cast_to_fp8(x, mn_major=mn_major)
    want = ops.per_token_cast_to_fp8(x[-256:].contiguous())
    assert torch.equal(bits(q[-256:]), bits(want[0]))
    assert torch.equal(sf[-256:], want[1])
