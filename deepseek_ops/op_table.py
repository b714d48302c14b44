"""One small case of every op: what ran, how far it is from float64, and its time beside plain torch's.

A case holds one formula in plain torch, written apart from the op's reference. In float64 it is the truth that the
op's result is held to; in float32 it is what one would write without this package, and its time is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import moe, quantize
from .bench import backend, measure
from .numeric import BLOCK, FP8, FP8_MAX, align, ceil_div
from .quantize import AMAX_FLOOR
from .registry import OPS
from .rope import rope_cos_sin

__all__ = ["CASES", "Case", "print_op_table", "worst_row"]

Arguments = tuple[Any, ...]

QUANTIZED = 1e-2
"""Limit for what is computed, then quantized: a last bit decides which way a value between two codes falls."""
BF16 = 4e-3
"""Limit for results that were rounded to bfloat16, from 3e-3 for its own rounding."""
FLOAT32 = 1e-5
EXACT = 0.0


@dataclass(frozen=True)
class Case:
    """A call of one op. All arguments stand in the order of the op's schema."""

    what: str
    """Its shapes, in words."""
    make: Callable[[str], Arguments]
    """The arguments on a device, random."""
    formula: Callable[..., Tensor]
    """`formula(precision, *arguments)`: the result in plain torch, computed in `precision`."""
    limit: float
    """What the worst row's relative error stays under."""
    result: Callable[[Arguments, Any], Tensor] = lambda arguments, returned: returned
    """What is compared with the formula, from the arguments after the call and what it returned."""


def print_op_table(device: str | None = None) -> bool:
    """Runs every case on `device` (the GPU if there is one) and prints a line for each; True if all errors are fine."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the cases are too small to share out
    try:
        return _print_lines(device)
    finally:
        torch.set_num_threads(num_threads)


def _print_lines(device: str) -> bool:
    print(f"{'op':36} {'case':34} {'backend':18} {'error':>8} {'time':>10} {'plain torch':>12}")
    fine = True
    for op in OPS:
        error, ours, plain = run(op, device)
        within = error <= CASES[op].limit
        fine &= within
        verdict = "" if within else f"  more than {CASES[op].limit:.0e}: wrong"
        print(
            f"{op:36} {CASES[op].what:34} {backend(op, device):18} {error:8.1e} "
            f"{ours * 1e6:7.1f} us {plain * 1e6:9.1f} us{verdict}"
        )
    print("error: worst row against float64; time: median of a call on this small case, inputs in the cache")
    return fine


def run(op: str, device: str) -> tuple[float, float, float]:
    """The error of `op`'s case on `device`, the seconds it takes, and those that plain torch takes."""
    case = CASES[op]
    arguments = _on(device, case.make)
    want = case.formula(torch.float64, *_clones(arguments))
    error = worst_row(case.result(arguments, OPS[op](*arguments)), want)
    calls = {
        "ours": [partial(OPS[op], *arguments)],
        "torch": [partial(case.formula, torch.float32, *_clones(arguments))],
    }
    measured = measure(calls, device=device, replays=3, warm_up=0.0)
    return error, measured.median("ours"), measured.median("torch")


def worst_row(got: Tensor, want: Tensor) -> float:
    """The largest relative L2 error of a row (last dimension), in float64; infinite where a NaN is not wanted."""
    got, want = got.double(), want.double()
    assert got.shape == want.shape, f"shape {list(got.shape)}, wanted {list(want.shape)}"
    same = (got == want) | (got.isnan() & want.isnan())
    error = torch.where(same, 0.0, got - want).norm(dim=-1)
    ratio = torch.where(error == 0, 0.0, error / torch.where(want.isnan(), 0.0, want).norm(dim=-1))
    return float(ratio.nan_to_num(nan=float("inf")).max()) if ratio.numel() else 0.0


def _on(device: str, make: Callable[[str], Arguments]) -> Arguments:
    torch.manual_seed(0)
    return make(device)


def _clones(arguments: Arguments) -> Arguments:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments)


def _normal(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


# ---------------------------------------------------------------------------------------------- quantization


def to_fp8(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8).to(x.dtype)


def spread(sf: Tensor, extent: int, dim: int) -> Tensor:
    """Scales of 128 elements each, repeated for every one of `extent` along `dim`."""
    return sf.index_select(dim, torch.arange(extent, device=sf.device) // BLOCK)


def token_quantized(
    precision: torch.dtype, x: Tensor, use_ue8m0: bool = False, mn_major: bool = False, floor: float = AMAX_FLOOR
) -> Tensor:
    """What is left of `x` after 1 x 128 quantization."""
    k = x.shape[-1]
    blocks = pad(x.abs(), (0, align(k, BLOCK) - k)).reshape(*x.shape[:-1], -1, BLOCK)
    return _quantized(precision, x, spread(blocks.amax(-1), k, -1), use_ue8m0, floor)


def block_quantized(precision: torch.dtype, x: Tensor, use_ue8m0: bool, floor: float) -> Tensor:
    """What is left of `x` after 128 x 128 quantization."""
    n, k = x.shape
    padded = pad(x.abs(), (0, align(k, BLOCK) - k, 0, align(n, BLOCK) - n))
    amax = padded.view(ceil_div(n, BLOCK), BLOCK, ceil_div(k, BLOCK), BLOCK).amax((1, 3))
    return _quantized(precision, x, spread(spread(amax, n, 0), k, 1), use_ue8m0, floor)


def _quantized(precision: torch.dtype, x: Tensor, amax: Tensor, use_ue8m0: bool, floor: float) -> Tensor:
    """`x` in the codes of scales from `amax`. The codes are chosen in float32, as the ops promise: where a value lies
    just between two of them, another precision would choose another one."""
    amax = amax.float().clamp(min=floor)
    if use_ue8m0:
        sf = torch.exp2(torch.ceil(torch.log2(amax.double() / FP8_MAX)))
        return to_fp8(x.float() / sf.float()).to(precision) * sf.to(precision)
    inverse = torch.full_like(amax, FP8_MAX) / amax  # `FP8_MAX / amax` would multiply by the reciprocal: two roundings
    return to_fp8(x.float() * inverse).to(precision) * (amax.to(precision) / FP8_MAX)


def token_dequantized(precision: torch.dtype, q: Tensor, sf: Tensor, *_: Any) -> Tensor:
    return q.to(precision) * spread(sf.to(precision), q.shape[-1], -1)


def block_dequantized(precision: torch.dtype, q: Tensor, sf: Tensor, *_: Any) -> Tensor:
    n, k = q.shape[-2:]
    return q.to(precision) * spread(spread(sf.to(precision), n, -2), k, -1)


def dequantized_tokens(arguments: Arguments, returned: tuple[Tensor, ...]) -> Tensor:
    return token_dequantized(torch.float64, *returned[:2])


def dequantized_blocks(arguments: Arguments, returned: tuple[Tensor, ...]) -> Tensor:
    return block_dequantized(torch.float64, *returned)


QUANTIZE = {
    "cast_to_fp8": Case(
        "256 x 1024",
        lambda device: (_normal(256, 1024, device=device),),
        lambda precision, x: to_fp8(x.to(precision)),
        EXACT,
    ),
    "per_token_cast_to_fp8": Case(
        "64 x 2048",
        lambda device: (_normal(64, 2048, device=device), False, True, AMAX_FLOOR),
        token_quantized,
        FLOAT32,
        dequantized_tokens,
    ),
    "per_token_cast_from_fp8": Case(
        "64 x 2048",
        lambda device: (*quantize.per_token_cast_to_fp8(_normal(64, 2048, device=device)), torch.bfloat16),
        token_dequantized,
        BF16,
    ),
    "per_block_cast_to_fp8": Case(
        "576 x 512",
        lambda device: (_normal(576, 512, device=device), False, AMAX_FLOOR),
        block_quantized,
        FLOAT32,
        dequantized_blocks,
    ),
    "per_block_cast_from_fp8": Case(
        "576 x 512",
        lambda device: (*quantize.per_block_cast_to_fp8(_normal(576, 512, device=device)), torch.bfloat16),
        block_dequantized,
        BF16,
    ),
    "to_mn_major_tma_aligned": Case(
        "4093 x 56",
        lambda device: (_normal(4093, 56, device=device, dtype=torch.float32),),
        lambda precision, sf: sf.T.contiguous().T.to(precision),
        EXACT,
    ),
}


# ------------------------------------------------------------------------------------------------------ GEMM


def _gemm_operands(m: int, n: int, k: int, device: str) -> Arguments:
    a, sfa = quantize.per_token_cast_to_fp8(_normal(m, k, device=device), mn_major=True)
    return a, sfa, *quantize.per_block_cast_to_fp8(_normal(n, k, device=device))


def gemm(precision: torch.dtype, a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, *_: Any) -> Tensor:
    """The product of the dequantized operands."""
    return token_dequantized(precision, a, sfa) @ block_dequantized(precision, b, sfb).T


GEMM = {
    "fp8_gemm_nt": Case(
        "64 x 576 x 512",
        lambda device: (*_gemm_operands(64, 576, 512, device), torch.bfloat16),
        gemm,
        BF16,
    ),
    "fp8_gemm_nt_out": Case(
        "64 x 576 x 512 into float32",
        lambda device: (*_gemm_operands(64, 576, 512, device), torch.empty(64, 576, device=device), False),
        gemm,
        5e-4,
        lambda arguments, _: arguments[4],
    ),
}


GROUPS, ROWS = 4, 128


def _grouped_operands(device: str, layout: list[int]) -> Arguments:
    """Four groups of 128 rows, one after the other, and which rows are whose."""
    a, sfa = quantize.per_token_cast_to_fp8(_normal(GROUPS * ROWS, 256, device=device))
    b, sfb = quantize.per_block_cast_to_fp8(_normal(GROUPS, 192, 256, device=device))
    return a, sfa, b, sfb, torch.tensor(layout, dtype=torch.int32, device=device)


def _contiguous_operands(device: str) -> Arguments:
    return _grouped_operands(device, [i if row < 100 else -1 for i in range(GROUPS) for row in range(ROWS)])


def _offsets_operands(device: str) -> Arguments:
    return _grouped_operands(device, [0, 100, 100, 300, 500])


def _masked_operands(device: str) -> Arguments:
    a, sfa, *rest = _grouped_operands(device, [100, 0, 128, 1])
    return a.view(GROUPS, ROWS, -1), sfa.view(GROUPS, ROWS, -1), *rest


def _k_grouped_operands(device: str) -> Arguments:
    a, sfa = quantize.per_token_cast_to_fp8(_normal(64, 1024, device=device))
    b, sfb = quantize.per_token_cast_to_fp8(_normal(192, 1024, device=device))
    return a, sfa, b, sfb, torch.tensor([0, 256, 256, 640, 1024], dtype=torch.int32, device=device)


def _bf16_operands(device: str) -> Arguments:
    """Some of 64 groups have no row, the others a few."""
    offsets = [min(i * i // 32, 96) for i in range(65)]
    operands = _normal(96, 256, device=device), _normal(64, 192, 256, device=device)
    return *operands, torch.tensor(offsets, dtype=torch.int32, device=device)


def _zeros(*shape: int, device: str) -> Tensor:
    return torch.zeros(shape, device=device)


def _by_owner(precision: torch.dtype, a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, owner: Tensor) -> Tensor:
    """Each row times its owner's weight; zeros for the rows of nobody."""
    x, w = token_dequantized(precision, a, sfa), block_dequantized(precision, b, sfb)
    return sum(((owner == i).unsqueeze(1) * (x @ w[i].T) for i in range(b.shape[0])), x.new_zeros(()))


def contiguous_gemm(precision: torch.dtype, *operands: Any) -> Tensor:
    return _by_owner(precision, *operands[:5])


def offsets_gemm(precision: torch.dtype, *operands: Any) -> Tensor:
    a, sfa, b, sfb, offsets = operands[:5]
    row = torch.arange(a.shape[0], device=a.device)
    return _by_owner(precision, a, sfa, b, sfb, torch.searchsorted(offsets.long(), row, right=True) - 1)


def offsets_bf16_gemm(precision: torch.dtype, a: Tensor, b: Tensor, offsets: Tensor, *_: Any) -> Tensor:
    owner = torch.searchsorted(offsets.long(), torch.arange(a.shape[0], device=a.device), right=True) - 1
    return (b.to(precision)[owner] @ a.to(precision).unsqueeze(2)).squeeze(2)


def masked_gemm(precision: torch.dtype, *operands: Any) -> Tensor:
    a, sfa, b, sfb, masked_m = operands[:5]
    d = token_dequantized(precision, a, sfa) @ block_dequantized(precision, b, sfb).mT
    row = torch.arange(a.shape[1], device=a.device)
    return d * (row < masked_m.unsqueeze(1)).unsqueeze(2)


def k_grouped_gemm(precision: torch.dtype, *operands: Any) -> Tensor:
    a, sfa, b, sfb, k_offsets = operands[:5]
    x, y = token_dequantized(precision, a, sfa), token_dequantized(precision, b, sfb)
    column = torch.arange(x.shape[1], device=a.device)
    inside = (column >= k_offsets[:-1, None]) & (column < k_offsets[1:, None])
    return (x * inside.unsqueeze(1)) @ y.T


GROUPED_GEMM = {
    "m_grouped_fp8_gemm_nt_contiguous": Case(
        "4 x 100 of 128 x 192 x 256",
        lambda device: (*_contiguous_operands(device), torch.bfloat16),
        contiguous_gemm,
        BF16,
    ),
    "m_grouped_fp8_gemm_nt_contiguous_out": Case(
        "4 x 100 of 128 x 192 x 256",
        lambda device: (*_contiguous_operands(device), _zeros(GROUPS * ROWS, 192, device=device), False),
        contiguous_gemm,
        5e-4,
        lambda arguments, _: arguments[5],
    ),
    "m_grouped_fp8_gemm_nt_offsets": Case(
        "4 groups, 500 x 192 x 256",
        lambda device: (*_offsets_operands(device), torch.bfloat16),
        offsets_gemm,
        BF16,
    ),
    "m_grouped_fp8_gemm_nt_offsets_out": Case(
        "4 groups, 500 x 192 x 256",
        lambda device: (*_offsets_operands(device), _zeros(GROUPS * ROWS, 192, device=device), False),
        offsets_gemm,
        5e-4,
        lambda arguments, _: arguments[5],
    ),
    "m_grouped_fp8_gemm_nt_masked": Case(
        "4 groups, 229 of 512 x 192 x 256",
        lambda device: (*_masked_operands(device), None, torch.bfloat16, False),
        masked_gemm,
        BF16,
    ),
    "m_grouped_fp8_gemm_nt_masked_out": Case(
        "4 groups, 229 of 512 x 192 x 256",
        lambda device: (*_masked_operands(device), _zeros(GROUPS, ROWS, 192, device=device), 64, False, True),
        masked_gemm,
        5e-4,
        lambda arguments, _: arguments[5],
    ),
    "m_grouped_bf16_gemm_nt_offsets": Case(
        "64 groups, 96 x 192 x 256",
        _bf16_operands,
        offsets_bf16_gemm,
        BF16,
    ),
    "m_grouped_bf16_gemm_nt_offsets_out": Case(
        "64 groups, 96 x 192 x 256",
        lambda device: (*_bf16_operands(device), _zeros(96, 192, device=device).bfloat16()),
        offsets_bf16_gemm,
        BF16,
        lambda arguments, _: arguments[3],
    ),
    "k_grouped_fp8_gemm_nt": Case(
        "4 groups, 64 x 192 x 1024",
        lambda device: (*_k_grouped_operands(device), torch.float32),
        k_grouped_gemm,
        5e-4,
    ),
    "k_grouped_fp8_gemm_nt_out": Case(
        "4 groups, 64 x 192 x 1024",
        lambda device: (*_k_grouped_operands(device), _zeros(GROUPS, 64, 192, device=device), False),
        k_grouped_gemm,
        5e-4,
        lambda arguments, _: arguments[5],
    ),
}


# ------------------------------------------------------------------------------------- norm, activation, rope


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(x.dtype)


def _norm(precision: torch.dtype, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm(x.to(precision), weight, eps)


def _add_norm(precision: torch.dtype, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    total = (x.to(precision) + residual.to(precision)).to(x.dtype).to(precision)
    return torch.cat((_rms_norm(total, weight, eps), total), -1)


def _norm_cast(precision: torch.dtype, x: Tensor, weight: Tensor, eps: float, use_ue8m0: bool, _: bool) -> Tensor:
    return token_quantized(precision, _norm(precision, x, weight, eps).to(x.dtype), use_ue8m0)


def _add_norm_cast(
    precision: torch.dtype, x: Tensor, residual: Tensor, weight: Tensor, eps: float, use_ue8m0: bool, _: bool
) -> Tensor:
    normed, total = _add_norm(precision, x, residual, weight, eps).chunk(2, -1)
    return torch.cat((token_quantized(precision, normed.to(x.dtype), use_ue8m0), total), -1)


def _norm_operands(device: str, num_inputs: int) -> list[Tensor]:
    return [*(_normal(64, 2048, device=device) for _ in range(num_inputs)), 1 + _normal(2048, device=device) / 8]


NORM = {
    "rms_norm": Case("64 x 2048", lambda device: (*_norm_operands(device, 1), 1e-6), _norm, BF16),
    "add_rms_norm": Case(
        "64 x 2048",
        lambda device: (*_norm_operands(device, 2), 1e-6),
        _add_norm,
        BF16,
        lambda _, returned: torch.cat(returned, -1),
    ),
    "rms_norm_cast_to_fp8": Case(
        "64 x 2048",
        lambda device: (*_norm_operands(device, 1), 1e-6, False, True),
        _norm_cast,
        QUANTIZED,
        dequantized_tokens,
    ),
    "add_rms_norm_cast_to_fp8": Case(
        "64 x 2048",
        lambda device: (*_norm_operands(device, 2), 1e-6, False, True),
        _add_norm_cast,
        QUANTIZED,
        lambda arguments, returned: torch.cat((dequantized_tokens(arguments, returned), returned[2]), -1),
    ),
}


def silu_mul(precision: torch.dtype, x: Tensor) -> Tensor:
    gate, up = x.to(precision).chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def _silu_mul_cast(precision: torch.dtype, x: Tensor, use_ue8m0: bool, _: bool) -> Tensor:
    return token_quantized(precision, silu_mul(precision, x).to(x.dtype), use_ue8m0)


ACTIVATION = {
    "silu_mul": Case("64 x 4096", lambda device: (_normal(64, 4096, device=device),), silu_mul, BF16),
    "silu_mul_cast_to_fp8": Case(
        "64 x 4096",
        lambda device: (_normal(64, 4096, device=device), False, True),
        _silu_mul_cast,
        QUANTIZED,
        dequantized_tokens,
    ),
}


def rotated(precision: torch.dtype, x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """Each pair of neighbours times `exp(i * angle)`, as complex numbers."""
    cos, sin = cos_sin.to(precision)[positions.long()].chunk(2, -1)
    turn = torch.complex(cos, sin).view(x.shape[0], *[1] * (x.dim() - 2), -1)
    pairs = torch.view_as_complex(x.to(precision).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)


def _positions(t: int, device: str) -> Tensor:
    return torch.randint(4096, (t,), device=device)


ROPE = {
    "rope": Case(
        "64 x 16 heads x 64",
        lambda device: (
            _normal(64, 16, 64, device=device),
            _positions(64, device),
            rope_cos_sin(4096, 64, device=device),
            True,
        ),
        lambda precision, x, positions, cos_sin, interleaved: rotated(precision, x, positions, cos_sin),
        BF16,
    ),
}


# --------------------------------------------------------------------------------------------- mixture of experts


def gate(precision: torch.dtype, logits: Tensor, bias: Tensor, k: int, groups: int, kept: int, *rest: Any) -> Tensor:
    """DeepSeek-V3's gate: the weight of every expert, zero for those that are not chosen."""
    scoring_func, norm_topk_prob, factor = rest
    assert scoring_func == "sigmoid"
    assert norm_topk_prob
    score = 1 / (1 + torch.exp(-logits.to(precision)))
    choice = (score + bias.to(precision)).view(logits.shape[0], groups, -1)
    best_groups = choice.topk(2, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
    allowed = torch.zeros_like(choice[..., 0]).scatter(-1, best_groups, 1.0).unsqueeze(-1) > 0
    idx = choice.where(allowed, -torch.inf).flatten(1).topk(k, dim=-1).indices
    weights = torch.zeros_like(score).scatter(-1, idx, score.gather(-1, idx))
    return factor * weights / weights.sum(-1, keepdim=True)


def gate_weights(arguments: Arguments, returned: tuple[Tensor, Tensor]) -> Tensor:
    weights, idx = returned
    return torch.zeros_like(arguments[0]).scatter(-1, idx.long(), weights)


def routing(t: int, device: str, num_experts: int = 256, num_topk: int = 8) -> Tensor:
    """Random distinct experts of each token, int32."""
    return torch.rand(t, num_experts, device=device).topk(num_topk, dim=-1).indices.int()


def mapping(precision: torch.dtype, topk_idx: Tensor, num_experts: int, alignment: int) -> Tensor:
    """Token and expert of each row, for an alignment of 1."""
    assert alignment == 1
    expert, pair = topk_idx.flatten().sort(stable=True)
    return torch.stack((pair // topk_idx.shape[1], expert)).to(precision)


def unpermuted(precision: torch.dtype, y: Tensor, row_idx: Tensor, weights: Tensor) -> Tensor:
    return (y[row_idx.long()].to(precision) * weights.to(precision).unsqueeze(-1)).sum(1)


def _unpermute_operands(device: str) -> Arguments:
    topk_idx = routing(64, device)
    row_idx = moe.moe_mapping(topk_idx, 256)[1]
    weights = torch.rand(64, 8, device=device)
    return _normal(512, 2048, device=device), row_idx, weights


MOE = {
    "moe_gate": Case(
        "64 tokens, 8 of 256 experts",
        lambda device: (
            _normal(64, 256, device=device, dtype=torch.float32),
            _normal(256, device=device, dtype=torch.float32) / 8,
            *(8, 8, 4, "sigmoid", True, 2.5),
        ),
        gate,
        FLOAT32,
        gate_weights,
    ),
    "moe_mapping": Case(
        "64 tokens, 8 of 256 experts",
        lambda device: (routing(64, device), 256, 1),
        mapping,
        EXACT,
        lambda _, returned: torch.stack((returned[0], returned[3])),
    ),
    "moe_permute": Case(
        "64 tokens x 2048 to 512 rows",
        lambda device: (_normal(64, 2048, device=device), moe.moe_mapping(routing(64, device), 256)[0]),
        lambda precision, x, token_idx: x[token_idx.long()].to(precision),
        EXACT,
    ),
    "moe_unpermute": Case("512 rows x 2048 to 64 tokens", _unpermute_operands, unpermuted, BF16),
}


# -------------------------------------------------------------------------------------------------------- MLA

SCALE = 192**-0.5


def mla_decoded(
    precision: torch.dtype,
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    causal: bool,
    cu_seqlens_q: Tensor | None,
    head_dim_v: int,
    batch_invariant: bool = False,
    kv_scale: float = 1.0,
) -> Tensor:
    """Output and log-sum-exp side by side, `[b, s_q, h, head_dim_v + 1]`."""
    assert cu_seqlens_q is None
    rows = cached(precision, kv_cache, rounded=False) * kv_scale
    keys = rows[block_table.long().clamp(0, kv_cache.shape[0] - 1)].flatten(1, 2)
    s_q = q.shape[1]
    position = torch.arange(keys.shape[1], device=q.device)
    last = cache_seqlens[:, None] - (torch.arange(s_q - 1, -1, -1, device=q.device) if causal else 0)
    visible = (position < last.expand(-1, s_q)[..., None])[:, :, None]
    scores = torch.einsum("bqhd,bkd->bqhk", q.to(precision), keys) * softmax_scale
    scores = scores.where(visible, -torch.inf)
    out = torch.einsum("bqhk,bkd->bqhd", scores.softmax(-1), keys[..., :head_dim_v])
    return torch.cat((out, scores.logsumexp(-1, keepdim=True)), -1)


def cached(precision: torch.dtype, kv_cache: Tensor, rounded: bool = True) -> Tensor:
    """A cache's rows, dequantized if they are FP8, and `rounded` to bfloat16 then."""
    if kv_cache.dtype != torch.uint8:
        return kv_cache.to(precision)
    latent = kv_cache[..., :512].contiguous().view(FP8)
    sf = kv_cache[..., 512:528].contiguous().view(torch.float32)
    pe = kv_cache[..., 528:].contiguous().view(torch.bfloat16)
    if rounded:
        return torch.cat((token_dequantized(torch.float32, latent, sf).bfloat16(), pe), -1).to(precision)
    return torch.cat((token_dequantized(precision, latent, sf), pe.to(precision)), -1)


def out_and_lse(arguments: Arguments, returned: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat((returned[0].double(), returned[1].double().unsqueeze(-1)), -1)


def paged_cache(b: int, s_k: int, device: str, page_size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """A random bfloat16 cache of `b` requests of `s_k` tokens, its pages in random order, and the lengths."""
    pages = ceil_div(s_k, page_size)
    kv_cache = torch.randn(b * pages, page_size, 576, device=device, dtype=torch.bfloat16)
    block_table = torch.randperm(b * pages, device=device).int().view(b, pages)
    return kv_cache, block_table, torch.full((b,), s_k, dtype=torch.int32, device=device)


def _decode_operands(device: str) -> Arguments:
    kv_cache, block_table, seqlens = paged_cache(4, 300, device)
    return _normal(4, 2, 16, 576, device=device), kv_cache, block_table, seqlens - 64


def _decode_out(precision: torch.dtype, *arguments: Any) -> Tensor:
    inputs, out, options = arguments[:4], arguments[4], arguments[6:]
    return mla_decoded(precision, *(*inputs, *options, out.shape[-1]))


def _prefilled(
    precision: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    sequence_q, from_end_q = _place(cu_seqlens_q, q.shape[0])
    sequence_k, from_end_k = _place(cu_seqlens_k, k.shape[0])
    visible = sequence_q[:, None] == sequence_k
    if causal:
        visible &= from_end_k >= from_end_q[:, None]
    scores = torch.einsum("qhd,khd->qhk", q.to(precision), k.to(precision)) * softmax_scale
    scores = scores.where(visible[:, None], -torch.inf)
    out = torch.einsum("qhk,khd->qhd", scores.softmax(-1), v.to(precision))
    return torch.cat((out, scores.logsumexp(-1, keepdim=True)), -1)


def _place(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The sequence of each row, and how many rows of that sequence come after it."""
    row = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].long(), row, right=True)
    return sequence, cu_seqlens[1:].long()[sequence] - 1 - row


def _prefill_operands(device: str) -> Arguments:
    cu_seqlens_q = torch.tensor([0, 40, 160], dtype=torch.int32, device=device)
    cu_seqlens_k = torch.tensor([0, 40, 224], dtype=torch.int32, device=device)
    q, k, v = (_normal(rows, 8, dim, device=device) for rows, dim in ((160, 192), (224, 192), (224, 128)))
    return q, k, v, cu_seqlens_q, cu_seqlens_k, SCALE, True


def _merged(precision: torch.dtype, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    lse = torch.stack((lse_a, lse_b)).to(precision)
    out = (torch.stack((out_a, out_b)).to(precision) * lse.softmax(0).unsqueeze(-1)).sum(0)
    return torch.cat((out, lse.logsumexp(0).unsqueeze(-1)), -1)


def _merge_operands(device: str) -> Arguments:
    outs = (_normal(64, 16, 512, device=device) for _ in range(2))
    lses = (_normal(64, 16, device=device, dtype=torch.float32) for _ in range(2))
    return next(outs), next(lses), next(outs), next(lses)


def _written(
    precision: torch.dtype,
    kv_c: Tensor,
    k_pe: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    kv_cache: Tensor,
    weight: Tensor,
    eps: float,
    interleaved: bool,
) -> Tensor:
    rows = torch.cat((_norm(precision, kv_c, weight, eps), rotated(precision, k_pe, positions, cos_sin)), -1)
    return kv_cache.to(precision).flatten(0, 1).index_copy(0, slots.long(), rows).view(kv_cache.shape)


def _write_operands(device: str) -> Arguments:
    return (
        _normal(64, 512, device=device),
        _normal(64, 64, device=device),
        _positions(64, device),
        rope_cos_sin(4096, 64, device=device),
        torch.randperm(8 * 64, device=device)[:64],
        paged_cache(1, 8 * 64, device)[0],
        1 + _normal(512, device=device) / 8,
        1e-6,
        True,
    )


def _gathered(
    precision: torch.dtype,
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    total: int,
    _: torch.dtype,
    kv_scale: float = 1.0,
) -> Tensor:
    sequence, _from_end = _place(cu_seqlens, total)
    token = torch.arange(total, device=kv_cache.device) - cu_seqlens.long()[sequence]
    page_size = kv_cache.shape[1]
    rows = cached(precision, kv_cache)[block_table[sequence, token // page_size].long(), token % page_size]
    return rows * kv_scale


def _gather_operands(device: str) -> Arguments:
    kv_cache, block_table, _ = paged_cache(2, 256, device)
    return kv_cache, block_table, torch.tensor([0, 200, 300], dtype=torch.int32, device=device), 300, torch.bfloat16


def _decode_out_operands(device: str) -> Arguments:
    out = torch.empty(4, 2, 16, 512, dtype=torch.bfloat16, device=device)
    return *_decode_operands(device), out, torch.empty(4, 2, 16, device=device), SCALE, True, None


MLA = {
    "mla_decode": Case(
        "4 x 2 x 236 tokens, 16 heads",
        lambda device: (*_decode_operands(device), SCALE, True, None, 512),
        mla_decoded,
        5e-3,
        out_and_lse,
    ),
    "mla_decode_out": Case(
        "4 x 2 x 236 tokens, 16 heads",
        _decode_out_operands,
        _decode_out,
        5e-3,
        lambda arguments, _: out_and_lse(arguments, arguments[4:6]),
    ),
    "mla_prefill": Case("160 of 224 tokens, 8 heads", _prefill_operands, _prefilled, 5e-3, out_and_lse),
    "merge_attn_states": Case("64 x 16 heads x 512", _merge_operands, _merged, BF16, out_and_lse),
    "mla_cache_write": Case(
        "64 tokens of 576 into 8 pages", _write_operands, _written, BF16, lambda arguments, _: arguments[5]
    ),
    "mla_cache_gather": Case("300 tokens of 576", _gather_operands, _gathered, EXACT),
}

CASES: dict[str, Case] = {**QUANTIZE, **GEMM, **GROUPED_GEMM, **NORM, **ACTIVATION, **ROPE, **MOE, **MLA}
"""Op -> its case. tests/test_op_table.py keeps it complete."""
