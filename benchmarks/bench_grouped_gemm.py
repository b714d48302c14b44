"""The grouped GEMMs, with experts of unequal load: in FP8 contiguous and offsets (prefill), masked and offsets
(decoding) and split by columns (training); in bfloat16 offsets (decoding)."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import deepseek_ops
from benchmarks import peers
from benchmarks.harness import OURS, Case, Prepare, called, normal, ours, some_rows, worst_row
from benchmarks.shapes import (
    CONTIGUOUS,
    CONTIGUOUS_LATER,
    CONTIGUOUS_STAND_INS,
    DEVICE,
    FP8_EXPERTS,
    FP8_EXPERTS_STAND_INS,
    K_GROUPED,
    K_GROUPED_EMPTY,
    K_GROUPED_STAND_INS,
    LITE_EXPERTS,
    LITE_EXPERTS_STAND_INS,
    MASKED,
    MASKED_LATER,
    MASKED_STAND_INS,
    ChosenExperts,
    GroupedGemm,
    KGroupedGemm,
    for_this_machine,
)
from deepseek_ops.numeric import BLOCK, FP8, align
from deepseek_ops.op_table import CASES, k_grouped_gemm
from tests.support import BF16_LIMIT, dequantized_product


def weights(shape: GroupedGemm | ChosenExperts, seed: int):
    return deepseek_ops.per_block_cast_to_fp8(normal(shape.groups, shape.n, shape.k, seed=2 * seed + 1))


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def output(*extents: int) -> torch.Tensor:
    return torch.empty(*extents, dtype=torch.bfloat16, device=DEVICE)


def contiguous_operands(shape: GroupedGemm, seed: int):
    """Rows sorted by group, each group padded to a multiple of 128 rows, and an output."""
    m_indices = [
        i if row < count else -1 for i, count in enumerate(shape.counts()) for row in range(align(count, BLOCK))
    ]
    a, sfa = deepseek_ops.per_token_cast_to_fp8(normal(len(m_indices), shape.k, seed=2 * seed), mn_major=True)
    return a, sfa, *weights(shape, seed), int32(m_indices), output(len(m_indices), shape.n), False


def offsets_operands(shape: GroupedGemm | ChosenExperts, seed: int):
    """The same groups without padding."""
    offsets = [0]
    for count in shape.counts():
        offsets.append(offsets[-1] + count)
    a, sfa = deepseek_ops.per_token_cast_to_fp8(normal(offsets[-1], shape.k, seed=2 * seed), mn_major=True)
    return a, sfa, *weights(shape, seed), int32(offsets), output(offsets[-1], shape.n), False


def masked_operands(shape: GroupedGemm, seed: int):
    """A buffer of fixed size for each group, of which the first rows count, and such a buffer for the output."""
    x = normal(shape.groups, shape.max_m, shape.k, seed=2 * seed)
    a, sfa = deepseek_ops.per_token_cast_to_fp8(x, mn_major=True)
    out = output(shape.groups, shape.max_m, shape.n)
    return a, sfa, *weights(shape, seed), int32(shape.counts()), out, shape.rows, False


FEW_ROWS = 64
"""Up to which weights may be read ahead."""


def masked_variants(op: str, shape: GroupedGemm) -> dict[str, Prepare]:
    """The op on weights that are constant, and where it matters without that promise."""
    in_flight = {"masked_in_flight": called(op, False, writes=5)} if shape.rows <= FEW_ROWS else {}
    return {OURS: called(op, True, writes=5), **in_flight}


def error_of_rows(inputs, out, owner: list[int]) -> float:
    """Against the product with the owner's weight, in a few rows of each group."""
    a, sfa, b, sfb, *_ = inputs
    owners, errors = torch.tensor(owner), [0.0]
    for i in range(b.shape[0]):
        mine = (owners == i).nonzero().squeeze(1)
        rows = mine[some_rows(len(mine), "cpu", at_most=8)].to(a.device)
        errors.append(worst_row(out[rows], dequantized_product(a[rows], sfa[rows], b[i], sfb[i])))
    return max(errors)


def contiguous_error(inputs, out) -> float:
    return error_of_rows(inputs, out, inputs[4].tolist())


def offsets_error(inputs, out) -> float:
    ends = inputs[4].tolist()
    return error_of_rows(inputs, out, [i for i in range(len(ends) - 1) for _ in range(ends[i + 1] - ends[i])])


def masked_error(inputs, out) -> float:
    a, sfa, b, sfb, masked_m, *_ = inputs
    errors = []
    for i, count in enumerate(masked_m.tolist()):
        rows = some_rows(count, a.device, at_most=8)
        errors.append(worst_row(out[i, rows], dequantized_product(a[i, rows], sfa[i, rows], b[i], sfb[i])))
    return max(errors)


def k_grouped_operands(shape: KGroupedGemm, seed: int):
    """The tokens of all groups side by side, as columns."""
    offsets = [0]
    for count in shape.counts():
        offsets.append(offsets[-1] + count)
    a, sfa = deepseek_ops.per_token_cast_to_fp8(normal(shape.m, offsets[-1], seed=2 * seed), mn_major=True)
    b, sfb = deepseek_ops.per_token_cast_to_fp8(normal(shape.n, offsets[-1], seed=2 * seed + 1), mn_major=True)
    return a, sfa, b, sfb, int32(offsets), torch.float32


def k_grouped_error(inputs, out) -> float:
    """In a few rows of every group's output, at least one in each 128."""
    a, sfa, *rest = inputs
    rows = some_rows(a.shape[0], a.device)
    return worst_row(out[:, rows], k_grouped_gemm(torch.float64, a[rows], sfa[rows], *rest))


def bf16_operands(shape: ChosenExperts, seed: int):
    offsets = [0]
    for count in shape.counts():
        offsets.append(offsets[-1] + count)
    a, b = normal(shape.rows, shape.k, seed=2 * seed), normal(shape.groups, shape.n, shape.k, seed=2 * seed + 1)
    return a, b, int32(offsets)


def bf16_error(inputs, out) -> float:
    a, b, offsets = inputs
    ends, errors = offsets.tolist(), [0.0]
    for i in range(b.shape[0]):
        rows = slice(ends[i], ends[i + 1])
        errors.append(worst_row(out[rows], a[rows].double() @ b[i].double().T))
    return max(errors)


LAYOUTS = {
    "contiguous": (contiguous_operands, contiguous_error, peers.contiguous_gemm),
    "offsets": (offsets_operands, offsets_error, dict),
}


def case(
    op: str,
    shape: GroupedGemm | KGroupedGemm | ChosenExperts,
    make,
    error,
    providers,
    limit: float = BF16_LIMIT,
    multiplied: torch.dtype = FP8,
) -> Case:
    return Case(
        op=op,
        case=str(shape),
        make=partial(make, shape),
        providers=providers,
        error=error,
        limit=limit,
        flops=shape.flops,
        num_bytes=shape.num_bytes,
        multiplied=multiplied,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", for_this_machine((*CONTIGUOUS, *CONTIGUOUS_LATER), CONTIGUOUS_STAND_INS), ids=str)
def test_m_grouped_fp8_gemm_nt_out(gpu_bench, shape: GroupedGemm, layout: str):
    """Into an output that is there, as engines do and as the peer is called: nobody's rows stay untouched."""
    make, error, rivals = LAYOUTS[layout]
    op = f"m_grouped_fp8_gemm_nt_{layout}_out"
    gpu_bench(case(op, shape, make, error, {**ours(op, writes=5), **rivals()}))


@pytest.mark.parametrize("shape", for_this_machine((*MASKED, *MASKED_LATER), MASKED_STAND_INS), ids=str)
def test_m_grouped_fp8_gemm_nt_masked_out(gpu_bench, shape: GroupedGemm):
    op = "m_grouped_fp8_gemm_nt_masked_out"
    providers = {**masked_variants(op, shape), **peers.masked_gemm(shape.rows)}
    gpu_bench(case(op, shape, masked_operands, masked_error, providers))


@pytest.mark.parametrize("shape", for_this_machine(FP8_EXPERTS, FP8_EXPERTS_STAND_INS), ids=str)
def test_m_grouped_fp8_gemm_nt_offsets_out_of_few_rows(gpu_bench, shape: ChosenExperts):
    op = "m_grouped_fp8_gemm_nt_offsets_out"
    gpu_bench(case(op, shape, offsets_operands, offsets_error, ours(op, writes=5)))


@pytest.mark.parametrize("shape", for_this_machine(LITE_EXPERTS, LITE_EXPERTS_STAND_INS), ids=str)
def test_m_grouped_bf16_gemm_nt_offsets(gpu_bench, shape: ChosenExperts):
    op = "m_grouped_bf16_gemm_nt_offsets"
    providers = {**ours(op), **peers.offsets_bf16_gemm()}
    gpu_bench(case(op, shape, bf16_operands, bf16_error, providers, multiplied=torch.bfloat16))


@pytest.mark.parametrize("shape", for_this_machine((*K_GROUPED, *K_GROUPED_EMPTY), K_GROUPED_STAND_INS), ids=str)
def test_k_grouped_fp8_gemm_nt(gpu_bench, shape: KGroupedGemm):
    op = "k_grouped_fp8_gemm_nt"
    providers = {**ours(op), **peers.k_grouped_gemm()}
    gpu_bench(case(op, shape, k_grouped_operands, k_grouped_error, providers, CASES[op].limit))
