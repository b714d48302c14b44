"""Linear layers of several parts, with FP8 weights of any raggedness."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import deepseek_ops.model.linear as linear_module
from deepseek_ops import (
    m_grouped_bf16_gemm_nt_offsets,
    per_block_cast_to_fp8,
    per_token_cast_from_fp8,
    per_token_cast_to_fp8,
    rms_norm,
    silu_mul,
)
from deepseek_ops.model.linear import Fp8Linear, Gemm, Linear, linear_float32, make_linear, padded
from deepseek_ops.registry import Op
from tests.support import BF16_LIMIT, DEVICES, assert_rows_close

DTYPES = [torch.float32, torch.bfloat16]


def dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    row, column = (torch.arange(extent) // 128 for extent in weight.shape)
    return weight.float() * scale[row][:, column]


def zeroed(layer: Linear) -> Linear:
    for parameter in layer.parameters():
        parameter.data.zero_()
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_the_projections_one_by_one(dtype: torch.dtype) -> None:
    layer = Linear(24, (5, 7), dtype=dtype)
    weights = [torch.randn(5, 24, dtype=dtype), torch.randn(7, 24, dtype=dtype)]
    for part, weight in enumerate(weights):
        layer.load_part(part, weight)
    x = torch.randn(3, 24, dtype=dtype)
    for got, weight in zip(layer.split(layer(x)), weights, strict=True):
        assert_rows_close(got, F.linear(x.double(), weight.double()), 1e-6 if dtype == torch.float32 else BF16_LIMIT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(128,), (576,), (192, 576), (40, 192), (320, 320)], ids=str)
def test_fp8_parts_start_at_whole_blocks_and_keep_their_scales(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = zeroed(Fp8Linear(256, rows, dtype=dtype))
    x = torch.randn(4, 256, dtype=dtype)
    rounded = per_token_cast_from_fp8(*per_token_cast_to_fp8(x), out_dtype=torch.float32)
    truths = []
    for part, n in enumerate(rows):
        weight, scale = per_block_cast_to_fp8(torch.randn(n, 256) * 10.0**part)
        layer.load_part(part, weight, scale)
        truths.append(rounded.double() @ dequantized(weight, scale).double().T)
    y = layer(x)
    assert y.dtype == dtype
    for got, want in zip(layer.split(y), truths, strict=True):
        assert_rows_close(got, want, 1e-5 if dtype == torch.float32 else BF16_LIMIT)


def test_a_narrower_part_leaves_zeros_behind_it() -> None:
    """How a dense MLP whose width is not whole blocks is padded."""
    assert padded(10944, "fp8") == 11008
    assert padded(10944, "bf16") == 10944
    layer = zeroed(Fp8Linear(256, (256, 256), dtype=torch.float32))
    for part in range(2):
        layer.load_part(part, *per_block_cast_to_fp8(torch.randn(192, 200)))
    weight = layer.dequantized()
    for part in range(2):
        rows = weight[256 * part : 256 * (part + 1)]
        assert rows[:192, :200].any(dim=-1).all()
        assert not rows[192:].any()
        assert not rows[:, 200:].any()


def test_dequantized_is_the_weight_that_the_checkpoint_means() -> None:
    weight, scale = per_block_cast_to_fp8(torch.randn(576, 384))
    layer = Fp8Linear(384, (576,), dtype=torch.float32)
    layer.load_part(0, weight, scale)
    assert torch.equal(layer.dequantized(), dequantized(weight, scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_float_layer_dequantizes_and_an_fp8_layer_quantizes_what_it_loads(dtype: torch.dtype) -> None:
    x = torch.randn(200, 128, dtype=dtype)
    weight, scale = per_block_cast_to_fp8(x)
    in_float, in_fp8 = Linear(128, (200,), dtype=dtype), Fp8Linear(128, (200,), dtype=dtype)
    in_float.load_part(0, weight, scale)
    in_fp8.load_part(0, x)
    assert torch.equal(in_float.weight, dequantized(weight, scale).to(dtype))
    assert torch.equal(in_fp8.weight.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(in_fp8.weight_scale_inv, scale)


def test_ue8m0_rounds_the_scales_of_inputs_up_to_powers_of_two() -> None:
    plain, rounded = (
        make_linear(128, (8,), gemm="fp8", dtype=torch.float32, use_ue8m0=use_ue8m0) for use_ue8m0 in (False, True)
    )
    assert isinstance(plain, Fp8Linear)
    assert isinstance(rounded, Fp8Linear)
    x = torch.randn(50, 128)
    sf, sf_plain = rounded.prepare(x)[1], plain.prepare(x)[1]
    assert (torch.frexp(sf).mantissa == 0.5).all()
    assert (sf >= sf_plain).all()
    assert (torch.frexp(sf_plain).mantissa != 0.5).any()


def test_each_expert_has_its_own_place() -> None:
    layer = zeroed(Fp8Linear(128, (128, 64), dtype=torch.float32, num_groups=3))
    weight, scale = per_block_cast_to_fp8(torch.randn(64, 128))
    layer.load_part(1, weight, scale, group=2)
    assert layer.weight.shape == (3, 192, 128)
    assert not layer.weight[:2].float().any()
    assert not layer.weight[2, :128].float().any()
    assert torch.equal(layer.weight[2, 128:].float(), weight.float())
    assert torch.equal(layer.weight_scale_inv[2, 1:], scale)


@pytest.mark.parametrize(("gemm", "use_ue8m0"), [("bf16", False), ("fp8", False), ("fp8", True)])
def test_an_input_prepared_in_one_pass_is_the_input_prepared_in_two(gemm: Gemm, use_ue8m0: bool) -> None:
    layer = make_linear(192, (64,), gemm=gemm, dtype=torch.bfloat16, use_ue8m0=use_ue8m0)
    x, residual = torch.randn(3, 192).bfloat16(), torch.randn(3, 192).bfloat16()
    weight, gate_up = torch.rand(192).bfloat16(), torch.randn(3, 384).bfloat16()
    added, new_residual = layer.prepare_add_norm(x, residual, weight, 1e-3)
    assert torch.equal(new_residual, x + residual)
    for one, two in (
        (layer.prepare_norm(x, weight, 1e-3), rms_norm(x, weight, eps=1e-3)),
        (added, rms_norm(x + residual, weight, eps=1e-3)),
        (layer.prepare_silu_mul(gate_up), silu_mul(gate_up)),
    ):
        want = layer.prepare(two)
        if isinstance(want, Tensor):
            assert isinstance(one, Tensor)
            assert torch.equal(one, want)
        else:
            assert torch.equal(one[0].view(torch.uint8), want[0].view(torch.uint8))
            assert torch.equal(one[1], want[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [(torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)]
)
def test_logits_are_not_rounded_to_the_operands_dtype(
    dtype: torch.dtype, weight_dtype: torch.dtype, device: str
) -> None:
    x, weight = torch.randn(3, 2048).to(device, dtype), torch.randn(50, 2048).to(device, weight_dtype)
    logits = linear_float32(x, weight)
    assert logits.dtype == torch.float32
    assert_rows_close(logits, x.double() @ weight.double().T, 1e-5)


def test_on_a_gpu_bfloat16_operands_of_logits_are_not_widened() -> None:
    """With fake tensors, which say what would be called without a GPU."""
    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode():
        x, weight = (torch.empty(n, 64, dtype=torch.bfloat16, device="cuda") for n in (3, 50))
        with Recorder():
            logits = linear_float32(x, weight)
    assert (logits.shape, logits.dtype) == ((3, 50), torch.float32)
    assert [name for name in called if "mm" in name or "copy" in name] == ["aten.mm.dtype"]


@pytest.mark.parametrize(
    ("rows", "dtype", "is_hopper", "few"),
    [
        (1, torch.bfloat16, True, True),
        (4 * 64, torch.bfloat16, True, True),
        (4 * 64 + 1, torch.bfloat16, True, False),
        (1, torch.float32, True, False),
        (1, torch.bfloat16, False, False),
    ],
)
def test_few_bfloat16_rows_of_experts_go_to_the_kernel_that_is_made_for_them(
    rows: int, dtype: torch.dtype, is_hopper: bool, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the GPU had the kernel: the op's reference stands in for it."""
    called = []

    def op(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        called.append(few)
        return m_grouped_bf16_gemm_nt_offsets(x, weight, offsets)

    monkeypatch.setattr(Op, "runs_kernel_on", lambda self, device: is_hopper)
    monkeypatch.setattr(linear_module, "m_grouped_bf16_gemm_nt_offsets", op)
    x, weight = torch.randn(rows, 64).to(dtype), torch.randn(4, 48, 64).to(dtype)
    y = linear_module.grouped_linear(x, weight, torch.tensor([0, 1, 1, 1, rows], dtype=torch.int32))
    assert called == [True] * few
    for row in {0, rows - 1}:
        assert_rows_close(y[row], weight[3 if row else 0].double() @ x[row].double(), BF16_LIMIT)
