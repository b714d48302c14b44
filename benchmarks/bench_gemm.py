"""The dense FP8 GEMM at the weights of DeepSeek-V3, from one token to a long prompt."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import deepseek_ops
from benchmarks import peers
from benchmarks.harness import OURS, Case, called, normal, some_rows, worst_row
from benchmarks.peers import Prepare
from benchmarks.shapes import DENSE, DENSE_STAND_INS, DGRAD, LATENT, SMALL_M, Gemm, for_this_machine
from tests.support import BF16_LIMIT, dequantized_product


def operands(shape: Gemm, seed: int):
    a, sfa = deepseek_ops.per_token_cast_to_fp8(normal(shape.m, shape.k, seed=2 * seed), mn_major=True)
    b, sfb = deepseek_ops.per_block_cast_to_fp8(normal(shape.n, shape.k, seed=2 * seed + 1))
    return a, sfa, b, sfb, torch.bfloat16


def error(inputs, out) -> float:
    a, sfa, b, sfb, _ = inputs
    rows = some_rows(a.shape[0], a.device)
    return worst_row(out[rows], dequantized_product(a[rows], sfa[rows], b, sfb))


VARIANTS_UP_TO = 128
"""Rows up to which k may be split, and weights read ahead: where it has a price to go without."""


def with_flags(*, batch_invariant: bool = False, b_is_constant: bool = True) -> Prepare:
    """The op with these flags. Weights are constant, unless it is said that they are not."""
    return called("fp8_gemm_nt", batch_invariant, b_is_constant)


def variants(shape: Gemm) -> dict[str, Prepare]:
    """The op called in other ways, in the rounds of the ordinary call."""
    if shape.m > VARIANTS_UP_TO:
        return {}
    return {"batch_invariant": with_flags(batch_invariant=True), "b_in_flight": with_flags(b_is_constant=False)}


@pytest.mark.parametrize("shape", for_this_machine((*DENSE, *SMALL_M, *LATENT, *DGRAD), DENSE_STAND_INS), ids=str)
def test_fp8_gemm_nt(gpu_bench, shape: Gemm):
    gpu_bench(
        Case(
            op="fp8_gemm_nt",
            case=str(shape),
            make=partial(operands, shape),
            providers={OURS: with_flags(), **variants(shape), **peers.dense_gemm()},
            error=error,
            limit=BF16_LIMIT,
            flops=shape.flops,
            num_bytes=shape.num_bytes,
        )
    )
