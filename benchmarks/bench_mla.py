"""MLA decoding over a paged cache, bfloat16 and FP8: the whole call, splitting and combining included."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks import peers
from benchmarks.harness import Case, generator, normal, ours, worst_row
from benchmarks.shapes import DEVICE, MLA, MLA_FP8, MLA_STAND_INS, Mla, for_this_machine
from deepseek_ops.numeric import ceil_div
from deepseek_ops.op_table import SCALE, mla_decoded
from deepseek_ops.quantize import per_token_cast_to_fp8

PAGE_SIZE = 64
MLA_LIMIT = 5e-3
"""Relative L2 error of a row: 2.4e-3 is what bfloat16 probabilities and outputs cost."""


def inputs(shape: Mla, seed: int):
    """Unit-normal queries and keys; the pages lie in random order."""
    pages = ceil_div(shape.s_k, PAGE_SIZE)
    kv_cache = normal(shape.batch * pages, PAGE_SIZE, 576, seed=2 * seed)
    if shape.cache == "fp8":
        kv_cache = fp8_rows(kv_cache)
    q = normal(shape.batch, shape.s_q, shape.heads, 576, seed=2 * seed + 1)
    order = torch.randperm(shape.batch * pages, generator=generator(seed), device=DEVICE)
    seqlens = torch.full((shape.batch,), shape.s_k, dtype=torch.int32, device=DEVICE)
    return q, kv_cache, order.int().view(shape.batch, pages), seqlens, SCALE, True, None, 512


def fp8_rows(kv_cache: torch.Tensor) -> torch.Tensor:
    """512 e4m3 values, 4 float32 scales and 64 bfloat16 values a token: 656 bytes."""
    q, sf = per_token_cast_to_fp8(kv_cache[..., :512])
    parts = (q, sf, kv_cache[..., 512:].contiguous())
    return torch.cat([x.view(torch.uint8) for x in parts], dim=-1)


def error(arguments, out) -> float:
    """Of the first and the last request; both outputs where `out` has both."""
    q, kv_cache, block_table, seqlens, *options = arguments
    errors = []
    for i in {0, q.shape[0] - 1}:
        pages = block_table[i : i + 1].long()
        own_table = torch.arange(pages.shape[1], device=DEVICE).unsqueeze(0)
        want = mla_decoded(
            torch.float64, q[i : i + 1], kv_cache[pages[0]], own_table, seqlens[i : i + 1], *options
        ).squeeze(0)
        got = out[0] if isinstance(out, tuple) else out
        errors.append(worst_row(got[i], want[..., :512]))
        if isinstance(out, tuple):
            errors.append(worst_row(out[1][i].unsqueeze(-1), want[..., 512:]))
    return max(errors)


def rivals(shape: Mla):
    if shape.cache != "bf16":
        return {}
    return {
        name: lambda q, kv, table, seqlens, *_, prepare=prepare: prepare(q, kv, table, seqlens)
        for name, prepare in peers.mla_decode(SCALE).items()
    }


@pytest.mark.parametrize("shape", for_this_machine((*MLA, *MLA_FP8), MLA_STAND_INS), ids=str)
def test_mla_decode(gpu_bench, shape: Mla):
    gpu_bench(
        Case(
            op="mla_decode",
            case=str(shape),
            make=partial(inputs, shape),
            providers={**ours("mla_decode"), **rivals(shape)},
            error=error,
            limit=MLA_LIMIT,
            flops=shape.flops,
            num_bytes=shape.num_bytes,
        )
    )
