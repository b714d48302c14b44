"""Gate, experts and MLP, each against its equation, token by token."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_ops import per_token_cast_from_fp8, per_token_cast_to_fp8
from deepseek_ops.model import DeepseekConfig
from deepseek_ops.model.linear import Fp8Linear, Gemm, grouped_linear
from deepseek_ops.model.moe import Experts, Gate, Mlp, MoE
from tests.model.conftest import V2, V3, VARIANTS
from tests.support import DEVICES, assert_rows_close

D = 128


def randomize(module: torch.nn.Module) -> None:
    """Random weights of unit gain, also behind FP8; padding stays zero."""
    for layer in module.modules():
        if not hasattr(layer, "load_part"):
            continue
        groups = [None] if layer.weight.dim() == 2 else range(layer.weight.shape[0])
        for group in groups:
            for part, rows in enumerate(layer.parts):
                n = rows.stop - rows.start
                layer.load_part(part, torch.randn(n, layer.in_features) * layer.in_features**-0.5, group=group)


def gated(x: Tensor, gate_up: Tensor, down: Tensor, fp8: bool) -> Tensor:
    """`down(silu(gate x) * up x)` in float64, rounding what FP8 rounds."""

    def rounded(v: Tensor) -> Tensor:
        if not fp8:
            return v.double()
        return per_token_cast_from_fp8(*per_token_cast_to_fp8(v.float()), out_dtype=torch.float32).double()

    gate, up = (rounded(x) @ gate_up.double().T).chunk(2, dim=-1)
    return rounded(F.silu(gate) * up) @ down.double().T


@pytest.mark.parametrize("gemm", ["bf16", "fp8"])
@pytest.mark.parametrize("t", [1, 5])
def test_mlp_is_its_equation(t: int, gemm: Gemm) -> None:
    mlp = Mlp(D, 128, gemm=gemm, dtype=torch.float32)
    randomize(mlp)
    x = torch.randn(t, D)
    want = gated(x, mlp.gate_up_proj.dequantized(), mlp.down_proj.dequantized(), gemm == "fp8")
    assert_rows_close(mlp(x), want, 1e-5 if gemm == "bf16" else 2e-2)


@pytest.mark.parametrize("gemm", ["bf16", "fp8"])
def test_experts_are_their_weighted_sum_token_by_token(gemm: Gemm) -> None:
    experts = Experts(4, D, 128, gemm=gemm, dtype=torch.float32)
    randomize(experts)
    topk_idx = torch.tensor([[0, 3], [3, 0], [0, 2]], dtype=torch.int32)  # nobody wants expert 1
    topk_weights = torch.rand(3, 2)
    x = torch.randn(3, D)
    up, down = experts.gate_up_proj, experts.down_proj
    want = torch.zeros(3, D, dtype=torch.float64)
    for token in range(3):
        for weight, e in zip(topk_weights[token], topk_idx[token].tolist(), strict=True):
            want[token] += weight * gated(x[token : token + 1], expert(up, e), expert(down, e), gemm == "fp8")[0]
    assert_rows_close(experts(x, topk_weights, topk_idx), want, 1e-5 if gemm == "bf16" else 2e-2)


def expert(layer: torch.nn.Module, e: int) -> Tensor:
    return layer.dequantized()[e]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_linear_gives_each_row_its_own_matrix(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 32).to(dtype), torch.randn(4, 48, 32).to(dtype)
    offsets = torch.tensor([0, 3, 3, 4, 7], dtype=torch.int32)
    owner = [0, 0, 0, 2, 3, 3, 3]
    want = torch.stack([weight[e].double() @ row for e, row in zip(owner, x.double(), strict=True)])
    assert_rows_close(grouped_linear(x, weight, offsets), want, 1e-6 if dtype == torch.float32 else 3e-3)
    assert grouped_linear(x[:0], weight, torch.zeros(5, dtype=torch.int32)).shape == (0, 48)


def chosen_by_hand(config: DeepseekConfig, logits: list[float], bias: list[float]) -> dict[int, float]:
    """The expert's weights of one token, in plain Python from the two reports."""
    values = torch.tensor(logits, dtype=torch.float64)
    is_v3 = config.topk_method == "noaux_tc"
    scores = (values.sigmoid() if is_v3 else values.softmax(0)).tolist()
    choices = [s + b for s, b in zip(scores, bias, strict=True)] if is_v3 else scores
    experts = list(range(len(scores)))
    if config.topk_method != "greedy":
        size = len(scores) // config.n_group
        groups = [experts[i * size : (i + 1) * size] for i in range(config.n_group)]
        best = 2 if is_v3 else 1
        groups.sort(key=lambda g: -sum(sorted((choices[e] for e in g), reverse=True)[:best]))
        experts = [e for g in groups[: config.topk_group] for e in g]
    experts = sorted(experts, key=lambda e: -choices[e])[: config.num_experts_per_tok]
    total = sum(scores[e] for e in experts) if config.norm_topk_prob else 1.0
    return {e: scores[e] / total * config.routed_scaling_factor for e in experts}


@pytest.mark.parametrize("name", ["V2-Lite", "V2", "V3", "V3 without norm_topk_prob, other eps"])
def test_the_gate_chooses_and_weights_as_the_report_says(name: str) -> None:
    config = VARIANTS[name]
    gate = Gate(config, dtype=torch.float32)
    gate.weight.data.copy_(torch.randn(gate.weight.shape) * config.hidden_size**-0.5)
    if gate.e_score_correction_bias is not None:
        gate.e_score_correction_bias.data.copy_(torch.randn(16) * 0.3)
    x = torch.randn(20, config.hidden_size, dtype=torch.bfloat16)
    weights, experts = gate(x)
    logits = x.float() @ gate.weight.T
    bias = [0.0] * 16 if gate.e_score_correction_bias is None else gate.e_score_correction_bias.tolist()
    for token in range(20):
        want = chosen_by_hand(config, logits[token].tolist(), bias)
        got = dict(zip(experts[token].tolist(), weights[token].tolist(), strict=True))
        assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["V2-Lite", "V3"])
def test_a_gate_in_bfloat16_chooses_as_its_weight_in_float32(name: str, device: str) -> None:
    """The same up to the order of additions, so where no two logits are nearly equal the same experts."""
    config = replace(VARIANTS[name], hidden_size=2048)
    gate, wide = (Gate(config, dtype=dtype).to(device) for dtype in (torch.bfloat16, torch.float32))
    gate.weight.data.copy_(torch.randn(gate.weight.shape) * config.hidden_size**-0.5)
    wide.weight.data.copy_(gate.weight)
    if gate.e_score_correction_bias is not None and wide.e_score_correction_bias is not None:
        gate.e_score_correction_bias.data.zero_()
        wide.e_score_correction_bias.data.zero_()
    x = torch.randn(100, config.hidden_size).to(device, torch.bfloat16)
    logits = x.double() @ gate.weight.double().T
    x = x[logits.sort(dim=-1).values.diff(dim=-1).amin(dim=-1) > 1e-3]
    assert len(x) > 50
    (weights, experts), (wanted_weights, wanted_experts) = gate(x), wide(x)
    assert torch.equal(experts, wanted_experts)
    torch.testing.assert_close(weights, wanted_weights, rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_v3_has_a_bias_and_it_is_float32(dtype: torch.dtype) -> None:
    assert Gate(V2, dtype=dtype).e_score_correction_bias is None
    gate = Gate(V3, dtype=dtype)
    assert gate.e_score_correction_bias is not None
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert gate.weight.dtype == dtype


@pytest.mark.parametrize("n_shared", [0, 1, 2])
def test_shared_experts_see_every_token_and_are_one_mlp(n_shared: int) -> None:
    config = replace(V3, n_shared_experts=n_shared)
    layer = MoE(config, gemm="bf16", dtype=torch.float32)
    randomize(layer)
    torch.nn.init.normal_(layer.gate.weight)
    assert layer.gate.e_score_correction_bias is not None
    layer.gate.e_score_correction_bias.data.zero_()
    x = torch.randn(3, config.hidden_size)
    routed = layer.experts(x, *layer.gate(x))
    if layer.shared_experts is None:
        assert n_shared == 0
        assert torch.equal(layer(x), routed)
        return
    assert layer.shared_experts.down_proj.in_features == n_shared * config.moe_intermediate_size
    assert_rows_close(layer(x), routed + layer.shared_experts(x), 1e-6)


def test_fp8_mlps_of_ragged_width_are_padded_with_exact_zeros() -> None:
    ragged = Mlp(D, 192, gemm="fp8", dtype=torch.float32)
    for layer in (ragged.gate_up_proj, ragged.down_proj):
        assert isinstance(layer, Fp8Linear)
        for parameter in layer.parameters():
            parameter.data.zero_()
    gate, up, down = torch.randn(192, D), torch.randn(192, D), torch.randn(D, 192)
    ragged.gate_up_proj.load_part(0, gate)
    ragged.gate_up_proj.load_part(1, up)
    ragged.down_proj.load_part(0, down)
    x = torch.randn(4, D)
    dequantized = ragged.gate_up_proj.dequantized()
    gate_up = torch.cat([dequantized[:192], dequantized[256 : 256 + 192]])
    assert_rows_close(ragged(x), gated(x, gate_up, ragged.down_proj.dequantized()[:, :192], True), 2e-2)
