"""The building blocks of csrc/ptx and csrc/device, each alone: compiled everywhere, run through CuPy on a GPU."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
HEADERS = sorted(path.relative_to(CSRC) for floor in ("ptx", "device", "kernels") for path in (CSRC / floor).iterdir())
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
FLAGS = ["-std=c++17", "-O3", "--generate-code=arch=compute_90a,code=[sm_90a]", "-Werror=all-warnings", f"-I{CSRC}"]

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def nvcc(*args):
    done = subprocess.run([NVCC, *FLAGS, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def cubin(tmp_path_factory):
    path = tmp_path_factory.mktemp("device") / "building_blocks.cubin"
    nvcc("-cubin", "-o", path, Path(__file__).with_name("building_blocks.cu"))
    return path


@pytest.fixture
def kernel(cubin):
    cupy = pytest.importorskip("cupy")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    module = cupy.RawModule(path=str(cubin))

    def run(name, grid, block, *args):
        module.get_function(name)((grid,), (block,), args)

    return run


def test_everything_compiles_without_warnings(cubin):
    assert cubin.stat().st_size > 0


def test_each_header_stands_alone(tmp_path):
    source = tmp_path / "headers.cu"
    for header in HEADERS:
        source.write_text(f'#include "{header}"\n#include "{header}"\nint main() {{}}\n')
        nvcc("-Xcompiler=-fsyntax-only", "-cuda", "-o", tmp_path / "headers.ii", source)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [64, 128])
def test_wgmma_multiplies_a_swizzled_tile(kernel, n):
    import cupy

    a = torch.randint(-8, 9, (64, 128)).float().to(torch.float8_e4m3fn)
    b = torch.randint(-8, 9, (n, 128)).float().to(torch.float8_e4m3fn)
    d = cupy.full((64, n), np.nan, np.float32)
    kernel(f"multiply_64x{n}", 1, 128, *(cupy.asarray(x.view(torch.uint8).numpy()) for x in (a, b)), d)
    scale = torch.tensor([2.0] * 8 + [4.0] * 8).repeat(4).unsqueeze(1)
    assert np.array_equal(d.get(), (a.float() @ b.float().T * scale).numpy())


@pytest.mark.gpu
@pytest.mark.parametrize("num_blocks", [0, 1, 2, 3, 4, 7, 100])
def test_a_pipeline_keeps_order_and_fills_with_zeros(kernel, num_blocks):
    import cupy

    source = cupy.random.rand(max(1, num_blocks), 32, dtype=np.float32)
    destination = cupy.full_like(source, np.nan)
    kernel("copy_through_pipeline", 1, 64, source, destination, np.int32(num_blocks))
    want = source.get()[:num_blocks]
    want[:, 31] = 0
    assert np.array_equal(destination.get()[:num_blocks], want)


@pytest.mark.gpu
@pytest.mark.parametrize("use_ue8m0", [False, True])
def test_block_scales_are_the_references(kernel, use_ue8m0):
    import cupy

    from deepseek_ops.quantize import scales

    powers, odd = 448 * 2.0 ** torch.arange(-20, 20), torch.tensor([0.0, 3.4e38, torch.inf])
    amax = torch.cat([torch.rand(1000), torch.logspace(-38, 38, 1000), powers, odd])
    got = cupy.zeros((len(amax), 2), np.float32)
    count, floor = np.int32(len(amax)), np.float32(1e-30)
    kernel("scale_blocks", 16, 256, cupy.asarray(amax.numpy()), got, count, floor, np.int32(use_ue8m0))
    want = torch.stack(scales(amax, use_ue8m0, 1e-30), dim=1)
    assert np.array_equal(got.get(), want.numpy())


@pytest.mark.gpu
def test_conversion_to_e4m3_is_torchs_after_saturation(kernel):
    import cupy

    from deepseek_ops.quantize import cast_to_fp8_reference

    every_upper_half = torch.arange(1 << 16, dtype=torch.int32).bitwise_left_shift(16).view(torch.float32)
    x = torch.cat([every_upper_half, torch.randn(1 << 16) * 100])
    pairs = cupy.zeros(len(x), np.uint16)
    kernel("convert_to_e4m3", len(x) // 256, 256, cupy.asarray(x.numpy()), pairs, np.int32(len(x)))
    want = cast_to_fp8_reference(x).view(torch.uint8).numpy()
    nan = x.isnan().numpy()
    for byte in (pairs.get() & 0xFF, pairs.get() >> 8):
        assert np.array_equal(byte[~nan], want[~nan])
        assert np.array_equal(byte[nan] & 0x7F, np.full(nan.sum(), 0x7F))


@pytest.mark.gpu
def test_stmatrix_takes_an_accumulators_layout(kernel):
    import cupy

    tile = cupy.zeros((16, 16), np.uint16)
    kernel("store_matrix", 1, 32, tile)
    assert np.array_equal(tile.get(), np.arange(256, dtype=np.uint16).reshape(16, 16))


@pytest.mark.gpu
def test_movmatrix_transposes_what_the_lanes_hold(kernel):
    import cupy

    tile = cupy.zeros((8, 8), np.uint16)
    kernel("transpose_matrix", 1, 32, tile)
    assert np.array_equal(tile.get(), np.arange(64, dtype=np.uint16).reshape(8, 8).T)
