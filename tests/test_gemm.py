"""The dense FP8 GEMM: right at every edge, by row and by tile, and nothing written outside the output."""

import math

import pytest
import torch

import deepseek_ops as ops
from deepseek_ops.gemm import fp8_gemm_nt_reference
from tests.support import (
    BF16_LIMIT,
    FP32_LIMIT,
    Guarded,
    assert_gemm_close,
    assert_rows_close,
    bits,
    dequantized_product,
    quantized_operands,
)

E4M3 = torch.float8_e4m3fn
EDGE_M = [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 257]
SMALL_NK = [(8, 16), (64, 128), (72, 144), (128, 256), (136, 272), (264, 512)]
MODEL_NK = [
    (7168, 1152),
    (1536, 768),
    (768, 1536),
    (24576, 1536),
    (2112, 7168),
    (576, 7168),
    (7168, 2304),
    (32768, 512),
]

gpu_only = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def check(m, n, k, device, **options):
    a, sfa, b, sfb = quantized_operands(m, n, k, device, **options)
    want = dequantized_product(a, sfa, b, sfb)
    for dtype, limit in ((torch.bfloat16, BF16_LIMIT), (torch.float32, FP32_LIMIT)):
        got = ops.fp8_gemm_nt(a, sfa, b, sfb, out_dtype=dtype)
        assert got.dtype == dtype
        assert_gemm_close(got, want, limit)


def exact_operands(m, n, k, device, seed):
    """Small integers and power-of-two scales: every sum is exact, also in the tensor core's short accumulator."""
    g = torch.Generator().manual_seed(seed)

    def integers(rows):
        return torch.randint(-8, 9, (rows, k), generator=g) * (torch.rand(rows, k, generator=g) < 0.25)

    def powers(*shape):
        return 2.0 ** torch.randint(-1, 2, shape, generator=g)

    blocks = math.ceil(k / 128)
    a, b = integers(m).float().to(E4M3), integers(n).float().to(E4M3)
    return [x.to(device) for x in (a, powers(m, blocks), b, powers(math.ceil(n / 128), blocks))]


@pytest.mark.parametrize(("n", "k"), SMALL_NK)
@pytest.mark.parametrize("m", EDGE_M)
def test_matches_float64_on_the_dequantized_operands(m, n, k, device):
    check(m, n, k, device)


@pytest.mark.parametrize("k", [16, 112, 128, 144, 240, 256, 1152])
def test_takes_any_k_that_is_a_multiple_of_16(k, device):
    check(65, 136, k, device)


def test_takes_power_of_two_scales(device):
    check(33, 264, 400, device, use_ue8m0=True)


@pytest.mark.parametrize("empty", ["m", "n", "k", "mn", "mk", "nk", "mnk"])
def test_empty_extents_give_empty_or_zero_outputs(empty, device):
    m, n, k = (0 if extent in empty else 64 for extent in "mnk")
    a, sfa, b, sfb = quantized_operands(m, n, k, device)
    got = ops.fp8_gemm_nt(a, sfa, b, sfb)
    assert got.shape == (m, n)
    assert (got == 0).all()
    out = torch.ones(m, n, device=device)
    ops.fp8_gemm_nt_out(a, sfa, b, sfb, out, accumulate=True)
    assert (out == 1).all()
    ops.fp8_gemm_nt_out(a, sfa, b, sfb, out)
    assert k > 0 or (out == 0).all()


@pytest.mark.parametrize("seed", range(20))
def test_small_integers_are_exact(seed, device):
    m, n, k = [(5, 8, 128), (64, 128, 512), (193, 136, 400), (130, 264, 1024)][seed % 4]
    a, sfa, b, sfb = exact_operands(m, n, k, device, seed)
    want = dequantized_product(a, sfa, b, sfb)
    assert torch.equal(ops.fp8_gemm_nt(a, sfa, b, sfb, out_dtype=torch.float32), want.float())
    assert torch.equal(ops.fp8_gemm_nt(a, sfa, b, sfb), want.bfloat16())


@pytest.mark.parametrize("digit", range(4))
def test_each_output_comes_from_its_own_row_and_column(digit, device):
    m = n = k = 256
    b = torch.eye(n, k, device=device).to(E4M3)
    row, column = torch.meshgrid(torch.arange(m, device=device), torch.arange(k, device=device), indexing="ij")
    a = torch.stack([row % 16, row // 16, column % 16, column // 16])[digit].float().to(E4M3)
    sfa, sfb = torch.ones(m, 2, device=device), torch.ones(2, 2, device=device)
    got = ops.fp8_gemm_nt(a, sfa, b, sfb, out_dtype=torch.float32)
    wrong = (got != a.float()).nonzero()
    assert len(wrong) == 0, f"element {wrong[0].tolist()} is {got[tuple(wrong[0])]}, not {a[tuple(wrong[0])].float()}"


def test_every_scale_is_used_for_its_own_block(device):
    m, n, k = 130, 264, 400
    a = torch.ones(m, k, device=device).to(E4M3)
    b = torch.ones(n, k, device=device).to(E4M3)
    sfa = 2.0 ** (torch.arange(m * 4, device=device) % 7).view(m, 4)
    sfb = 2.0 ** (torch.arange(12, device=device) % 5).view(3, 4)
    got = ops.fp8_gemm_nt(a, sfa, b, sfb, out_dtype=torch.float32)
    assert torch.equal(got, dequantized_product(a, sfa, b, sfb).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n"), [(1, 8), (5, 72), (65, 136), (193, 264)])
def test_writes_the_output_and_nothing_else(m, n, dtype, device):
    a, sfa, b, sfb = quantized_operands(m, n, 272, device)
    want = dequantized_product(a, sfa, b, sfb)
    for stride in (n, n + 24):
        out = Guarded((m, n), dtype, device, (stride, 1))
        ops.fp8_gemm_nt_out(a, sfa, b, sfb, out.tensor)
        assert_gemm_close(out.tensor, want, BF16_LIMIT if dtype == torch.bfloat16 else FP32_LIMIT)
        out.assert_intact()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_accumulates(dtype, device):
    a, sfa, b, sfb = quantized_operands(70, 136, 272, device)
    start = torch.randn(70, 136, device=device).to(dtype)
    out = start.clone()
    ops.fp8_gemm_nt_out(a, sfa, b, sfb, out, accumulate=True)
    want = start.double() + dequantized_product(a, sfa, b, sfb)
    assert_gemm_close(out, want, BF16_LIMIT if dtype == torch.bfloat16 else FP32_LIMIT)


def test_what_the_output_held_before_does_not_matter(device):
    a, sfa, b, sfb = quantized_operands(65, 136, 272, device)
    want = ops.fp8_gemm_nt(a, sfa, b, sfb)
    for stale in (-want, torch.full_like(want, math.nan), torch.zeros_like(want)):
        ops.fp8_gemm_nt_out(a, sfa, b, sfb, stale)
        assert torch.equal(bits(stale), bits(want))


def test_views_give_the_bits_of_their_copies(device):
    a, sfa, b, sfb = quantized_operands(66, 136, 512, device)
    want = ops.fp8_gemm_nt(a[::2], sfa[::2].clone(), b, sfb)
    for scales in (sfa[::2], ops.to_mn_major_tma_aligned(sfa[::2])):
        assert torch.equal(bits(ops.fp8_gemm_nt(a[::2].clone(), scales, b, sfb)), bits(want))
    assert torch.equal(bits(ops.fp8_gemm_nt(a[::2], sfa[::2], b, sfb.T.contiguous().T)), bits(want))
    wide = torch.cat([b, b], dim=1)[:, :512]
    assert torch.equal(bits(ops.fp8_gemm_nt(a[::2], sfa[::2], wide, sfb)), bits(want))


@pytest.mark.parametrize("stride", [0, 16, 240])
def test_rows_that_overlap_are_refused(stride, device):
    a, sfa, b, sfb = quantized_operands(5, 136, 272, device)
    overlapping = a.view(torch.uint8).flatten().as_strided((5, 272), (stride, 1)).view(E4M3)
    with pytest.raises(ValueError, match="fp8_gemm_nt: a must be of rows that do not overlap"):
        ops.fp8_gemm_nt(overlapping, sfa, b, sfb)


@pytest.mark.parametrize("offset", range(1, 16))
def test_a_misaligned_operand_is_refused(offset, device):
    _, sfa, b, sfb = quantized_operands(4, 16, 128, device)
    buffer = torch.zeros(4 * 128 + 16, dtype=torch.uint8, device=device)
    shifted = buffer[offset : offset + 512].view(4, 128).view(E4M3)
    with pytest.raises(ValueError, match="fp8_gemm_nt: a must be aligned to 16 bytes, got a storage offset"):
        ops.fp8_gemm_nt(shifted, sfa, b, sfb)


def test_output_beside_an_input_in_one_allocation_is_fine(device):
    a, sfa, b, sfb = quantized_operands(4, 16, 128, device)
    buffer = torch.zeros(512 + 4 * 16 * 4, dtype=torch.uint8, device=device)
    buffer[:512] = a.view(torch.uint8).flatten()
    inside = buffer[:512].view(4, 128).view(E4M3)
    out = buffer[512:].view(torch.float32).view(4, 16)
    ops.fp8_gemm_nt_out(inside, sfa, b, sfb, out)
    assert_rows_close(out, dequantized_product(a, sfa, b, sfb), FP32_LIMIT)


def test_one_large_channel_spoils_no_other_block(device):
    x, w = torch.randn(65, 768), torch.randn(136, 768)
    x[:, 257] *= 50
    x[3, 700] = 1e4
    a, sfa = ops.per_token_cast_to_fp8(x.to(device))
    b, sfb = ops.per_block_cast_to_fp8(w.to(device))
    assert_gemm_close(ops.fp8_gemm_nt(a, sfa, b, sfb), dequantized_product(a, sfa, b, sfb), BF16_LIMIT)


def test_subnormals_and_extreme_scales_match_the_formula(device):
    steps = torch.arange(1, 8) * 2.0**-9
    a = steps.repeat(4, 19)[:, :128].to(E4M3).to(device)
    b = torch.ones(8, 128, device=device).to(E4M3)
    for exponent_a, exponent_b in ((-126, 100), (-126, 0), (100, 20), (-60, -60)):
        sfa = torch.full((4, 1), 2.0**exponent_a, device=device)
        sfb = torch.full((1, 1), 2.0**exponent_b, device=device)
        got = ops.fp8_gemm_nt(a, sfa, b, sfb, out_dtype=torch.float32)
        want = fp8_gemm_nt_reference(a.cpu(), sfa.cpu(), b.cpu(), sfb.cpu(), torch.float32)
        assert_rows_close(got.cpu(), want, FP32_LIMIT)


def test_nan_stays_in_its_row_and_column(device):
    a, sfa, b, sfb = quantized_operands(70, 136, 272, device)
    want = ops.fp8_gemm_nt(a, sfa, b, sfb)
    a.view(torch.uint8)[5, 17] = 0x7F
    b.view(torch.uint8)[40, 200] = 0xFF
    got = ops.fp8_gemm_nt(a, sfa, b, sfb)
    touched = torch.zeros_like(got, dtype=torch.bool)
    touched[5] = touched[:, 40] = True
    assert got[touched].isnan().all()
    assert torch.equal(got[~touched], want[~touched])


def test_tokens_do_not_see_one_another(device):
    a, sfa, b, sfb = quantized_operands(300, 136, 272, device)
    together = ops.fp8_gemm_nt(a, sfa, b, sfb)
    for rows in (slice(0, 1), slice(64, 65), slice(190, 200), slice(0, 193), slice(299, 300)):
        alone = ops.fp8_gemm_nt(a[rows], sfa[rows], b, sfb)
        if device == "cuda":
            assert torch.equal(bits(together[rows]), bits(alone)), "the order of additions depends on k alone"
        else:
            assert_rows_close(together[rows], alone, BF16_LIMIT)  # the CPU's matmul promises no order


def test_a_layer_exports_with_any_number_of_tokens(device):
    b, sfb = ops.per_block_cast_to_fp8(torch.randn(136, 512, device=device))

    class Layer(torch.nn.Module):
        def forward(self, x):
            return ops.fp8_gemm_nt(*ops.per_token_cast_to_fp8(x, mn_major=True), b, sfb)

    def tokens(m):
        return torch.randn(m, 512, device=device).bfloat16()

    program = torch.export.export(Layer(), (tokens(64),), dynamic_shapes=({0: torch.export.Dim("m")},))
    for m in (2, 63, 64, 200):
        x = tokens(m)
        assert torch.equal(program.module()(x), Layer()(x))


@pytest.mark.parametrize(("n", "k"), [pytest.param(n, k, marks=gpu_only) for n, k in MODEL_NK])
@pytest.mark.parametrize("m", [1, 65, 129, 4096])
def test_model_shapes_match(m, n, k):
    check(m, n, k, "cuda")


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=gpu_only) for seed in range(40)])
def test_fifty_random_shapes_match(seed):
    g = torch.Generator().manual_seed(1000 + seed)
    for _ in range(50):
        m = int(torch.randint(1, 700, (), generator=g))
        n = 8 * int(torch.randint(1, 130, (), generator=g))
        k = 16 * int(torch.randint(1, 130, (), generator=g))
        a, sfa, b, sfb = quantized_operands(m, n, k, "cuda", seed=seed)
        got = ops.fp8_gemm_nt(a, sfa, b, sfb)
        want = dequantized_product(a, sfa, b, sfb)
        assert_gemm_close(got, want, BF16_LIMIT)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [pytest.param(*s, marks=gpu_only) for s in [(300_000, 7168, 128), (131_200, 64, 16_384), (64, 131_200, 16_384)]],
)
def test_more_than_two_to_the_31_elements(m, n, k):
    """The output, A and B in turn; compared on the last rows and columns, where an offset would have wrapped."""
    a = torch.randint(0, 0x70, (m, k), dtype=torch.uint8, device="cuda").view(E4M3)
    b = torch.randint(0, 0x70, (n, k), dtype=torch.uint8, device="cuda").view(E4M3)
    sfa = torch.rand(m, k // 128, device="cuda") + 0.5
    sfb = torch.rand(math.ceil(n / 128), k // 128, device="cuda") + 0.5
    got = ops.fp8_gemm_nt(a, sfa, b, sfb)
    rows, columns = slice(max(0, m - 256), m), slice((n - 64) // 128 * 128, n)
    want = dequantized_product(a[rows], sfa[rows], b[columns], sfb[columns.start // 128 :])
    assert_gemm_close(got[rows, columns], want, BF16_LIMIT)


@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=gpu_only) for s in [(1, 2112, 7168), (257, 576, 7168), (4096, 7168, 2048)]]
)
def test_a_thousand_runs_give_the_same_bits(shape):
    a, sfa, b, sfb = quantized_operands(*shape, "cuda")
    want, out = ops.fp8_gemm_nt(a, sfa, b, sfb), None
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        out = ops.fp8_gemm_nt(a, sfa, b, sfb)
        differs |= (out.view(torch.int16) != want.view(torch.int16)).any()
    assert not differs.item()
