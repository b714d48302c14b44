"""The torch-free door: NumPy arrays on the CPU, CuPy arrays on the GPU, the same bits as the torch ops."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import deepseek_ops
from deepseek_ops import arrays
from tests.support import assert_gemm_close, dequantized_product, quantized_operands

ODD_VALUES = [
    0.0,
    -0.0,
    2.0**-9,
    3.5 * 2.0**-9,
    447.0,
    448.0,
    464.0,
    465.0,
    -480.0,
    1e4,
    3e38,
    float("inf"),
    float("nan"),
]


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def library(request):
    if request.param == "numpy":
        return np
    cupy = pytest.importorskip("cupy")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return cupy


def as_array(x, library=np):
    return library.asarray((x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x).numpy())


def to_numpy(x):
    return x if isinstance(x, np.ndarray) else x.get()


def as_torch(x, dtype):
    return torch.from_numpy(to_numpy(x).copy()).view(dtype)


@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize("shape", [(1, 128), (3, 300), (17, 8), (0, 128), (5, 0), (130, 257)])
def test_quantizes_to_the_same_bits_as_torch(library, shape, use_ue8m0):
    x = torch.randn(shape) * torch.logspace(-6, 4, max(1, shape[1]))[: shape[1]]
    q, sf = arrays.per_token_cast_to_fp8(library.asarray(x.numpy()), use_ue8m0=use_ue8m0)
    want_q, want_sf = deepseek_ops.per_token_cast_to_fp8(x, use_ue8m0=use_ue8m0)
    assert torch.equal(as_torch(q, torch.uint8), want_q.view(torch.uint8))
    assert torch.equal(as_torch(sf, torch.float32), want_sf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reads_half_precision_bits(library, dtype):
    x = torch.randn(9, 200).to(dtype)
    bits = x.view(torch.uint16).numpy() if dtype == torch.bfloat16 else x.numpy()
    q, sf = arrays.per_token_cast_to_fp8(library.asarray(bits))
    want_q, want_sf = deepseek_ops.per_token_cast_to_fp8(x)
    assert torch.equal(as_torch(q, torch.uint8), want_q.view(torch.uint8))
    assert torch.equal(as_torch(sf, torch.float32), want_sf)


def test_rounds_and_saturates_odd_values_like_torch(library):
    x = torch.tensor(ODD_VALUES).repeat(128, 1).T.contiguous()  # one value a row, so that its scale is its own
    x[:, 1] = 1.0
    q, sf = arrays.per_token_cast_to_fp8(library.asarray(x.numpy()))
    want_q, want_sf = deepseek_ops.per_token_cast_to_fp8(x)
    got, want = as_torch(q, torch.float8_e4m3fn).float(), want_q.float()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    assert torch.equal(as_torch(sf, torch.float32), want_sf)


def test_every_float_between_two_e4m3_values_goes_to_the_nearer_one():
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[:-1] + codes[1:]) / 2
    steps = torch.cat([codes, middles, middles.nextafter(codes[1:]), middles.nextafter(codes[:-1])])
    x = torch.full((len(steps), 128), 448.0)  # the scale is then exactly 1
    x[:, 0] = steps
    q, sf = arrays.per_token_cast_to_fp8(x.numpy())
    assert (sf == 1).all()
    assert torch.equal(as_torch(q, torch.uint8)[:, 0], steps.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 16), (5, 136, 272), (33, 24, 128), (0, 8, 16), (2, 8, 0)])
def test_multiplies(library, m, n, k):
    a, sfa, b, sfb = quantized_operands(m, n, k, "cpu")
    operands = [as_array(x, library) for x in (a, sfa, b, sfb)]
    got = arrays.fp8_gemm_nt(*operands)
    assert_gemm_close(as_torch(got, torch.float32), dequantized_product(a, sfa, b, sfb), 5e-4)
    again = arrays.fp8_gemm_nt(*operands, out=got, accumulate=True)
    assert_gemm_close(as_torch(again, torch.float32), 2 * dequantized_product(a, sfa, b, sfb), 5e-4)


def test_stores_bfloat16_bits(library):
    a, sfa, b, sfb = quantized_operands(4, 16, 128, "cpu")
    operands = [as_array(x, library) for x in (a, sfa, b, sfb)]
    got = arrays.fp8_gemm_nt(*operands, out=library.zeros((4, 16), np.uint16))
    assert_gemm_close(as_torch(got, torch.bfloat16), dequantized_product(a, sfa, b, sfb), 3e-3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a, *rest: (a.tolist(), *rest), TypeError, "a must be a CUDA or NumPy array"),
        (lambda a, *rest: (a.astype(np.float32), *rest), TypeError, "a must be e4m3 as 8-bit elements, got f4"),
        (lambda a, *rest: (a[:, ::2], *rest), ValueError, "b must be of shape"),
        (lambda a, sfa, *rest: (a, sfa[1:], *rest), ValueError, r"sfa must be of shape \[5, 3\]"),
        (lambda a, sfa, b, sfb: (np.asfortranarray(a), sfa, b, sfb), ValueError, "a must be contiguous in its last"),
        (lambda a, sfa, b, sfb: (a, sfa, b[:20], sfb[:1]), ValueError, "n must be a multiple of 8"),
    ],
)
def test_names_what_is_wrong(change, error, message):
    a, sfa, b, sfb = (as_array(x) for x in quantized_operands(5, 264, 272, "cpu"))
    with pytest.raises(error, match=message):
        arrays.fp8_gemm_nt(*change(a, sfa, b, sfb))


def test_refuses_to_write_a_read_only_array():
    q, sf = np.empty((2, 128), np.uint8), np.empty((2, 1), np.float32)
    q.flags.writeable = False
    with pytest.raises(ValueError, match="q must be writable"):
        deepseek_ops._native.per_token_cast_to_fp8(np.ones((2, 128), np.float32), q, sf)


def test_needs_no_torch():
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "import numpy, deepseek_ops.arrays as arrays\n"
        "q, sf = arrays.per_token_cast_to_fp8(numpy.ones((2, 128), numpy.float32))\n"
        "assert 'torch' not in sys.modules and not any('libtorch' in line for line in open('/proc/self/maps'))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
