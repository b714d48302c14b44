"""MLA: decoding over a paged cache, bfloat16 and FP8 (the whole call, splitting and combining included), prefill over
expanded keys, and the merging of two results."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import peers
from benchmarks.harness import Call, Case, Prepare, generator, normal, op_case, ours, some_rows, worst_row
from benchmarks.shapes import (
    DEVICE,
    HEADS_STAND_INS,
    MERGE,
    MLA,
    MLA_BETWEEN,
    MLA_FP8,
    MLA_GRID,
    MLA_ONE_SCALE,
    MLA_STAND_INS,
    PREFILL,
    PREFILL_STAND_INS,
    Heads,
    Mla,
    Prefill,
    for_this_machine,
)
from deepseek_ops.numeric import FP8, ceil_div
from deepseek_ops.op_table import CASES, SCALE, mla_decoded, out_and_lse
from deepseek_ops.quantize import cast_to_fp8, per_token_cast_to_fp8
from deepseek_ops.registry import OPS

PAGE_SIZE = 64
VARIED = tuple(x for x in MLA_GRID if x.heads == 16 and x.s_k <= 8192)
KV_SCALE = 2.0**-6
MLA_LIMIT = 5e-3
"""Relative L2 error of a row: 2.4e-3 is what bfloat16 probabilities and outputs cost."""


def inputs(shape: Mla, seed: int):
    """Unit-normal queries and keys; the pages lie in random order."""
    pages = ceil_div(shape.s_k, PAGE_SIZE)
    kv_cache = normal(shape.batch * pages, PAGE_SIZE, 576, seed=2 * seed)
    kv_cache, kv_scale = in_format(shape.cache, kv_cache)
    q = normal(shape.batch, shape.s_q, shape.heads, 576, seed=2 * seed + 1)
    order = torch.randperm(shape.batch * pages, generator=generator(seed), device=DEVICE)
    seqlens = torch.full((shape.batch,), shape.s_k, dtype=torch.int32, device=DEVICE)
    return q, kv_cache, order.int().view(shape.batch, pages), seqlens, SCALE, True, None, 512, False, kv_scale


def in_format(cache: str, kv_cache: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A bfloat16 cache in another format, and its scale."""
    if cache == "e4m3":
        return cast_to_fp8(kv_cache / KV_SCALE), KV_SCALE
    return fp8_rows(kv_cache) if cache == "fp8" else kv_cache, 1.0


def fp8_rows(kv_cache: torch.Tensor) -> torch.Tensor:
    """512 e4m3 values, 4 float32 scales and 64 bfloat16 values a token: 656 bytes."""
    q, sf = per_token_cast_to_fp8(kv_cache[..., :512])
    parts = (q, sf, kv_cache[..., 512:].contiguous())
    return torch.cat([x.view(torch.uint8) for x in parts], dim=-1)


def kept(kv_cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """These pages; not all versions of torch index 8-bit floats."""
    values = kv_cache.view(torch.uint8) if kv_cache.dtype == FP8 else kv_cache
    return values[pages].view(kv_cache.dtype)


def error(arguments, out) -> float:
    """Of the first and the last request; both outputs where `out` has both."""
    q, kv_cache, block_table, seqlens, *options = arguments
    errors = []
    for i in {0, q.shape[0] - 1}:
        pages = block_table[i : i + 1].long()
        own_table = torch.arange(pages.shape[1], device=DEVICE).unsqueeze(0)
        want = mla_decoded(
            torch.float64, q[i : i + 1], kept(kv_cache, pages[0]), own_table, seqlens[i : i + 1], *options
        ).squeeze(0)
        got = out[0] if isinstance(out, tuple) else out
        errors.append(worst_row(got[i], want[..., :512]))
        if isinstance(out, tuple):
            errors.append(worst_row(out[1][i].unsqueeze(-1), want[..., 512:]))
    return max(errors)


def called(*, batch_invariant: bool = False, ragged: bool = False) -> Prepare:
    """The op with these options; ragged queries are as many of each request all the same."""

    def prepare(*arguments) -> Call:
        q, kv_cache, block_table, seqlens, scale, causal, _, head_dim_v, *_ = arguments
        offsets = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=DEVICE) * q.shape[1] if ragged else None
        rows = q.flatten(0, 1) if ragged else q

        def call() -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = OPS["mla_decode"](
                rows, kv_cache, block_table, seqlens, scale, causal, offsets, head_dim_v, batch_invariant
            )
            return out.view(*q.shape[:-1], -1), lse.view(q.shape[:-1])

        return call

    return prepare


def variants(shape: Mla) -> dict[str, Prepare]:
    """The op called in other ways, in the rounds of the ordinary call, with the heads of a rank."""
    if shape not in VARIED:
        return {}
    return {"batch_invariant_decode": called(batch_invariant=True), "ragged_decode": called(ragged=True)}


def rivals(shape: Mla):
    if shape.cache != "bf16":
        return {}
    return {
        name: lambda q, kv, table, seqlens, *_, prepare=prepare: prepare(q, kv, table, seqlens)
        for name, prepare in peers.mla_decode(SCALE).items()
    }


@pytest.mark.parametrize(
    "shape", for_this_machine((*MLA, *MLA_BETWEEN, *MLA_ONE_SCALE, *MLA_FP8), MLA_STAND_INS), ids=str
)
def test_mla_decode(gpu_bench, shape: Mla):
    gpu_bench(
        Case(
            op="mla_decode",
            case=str(shape),
            make=partial(inputs, shape),
            providers={**ours("mla_decode"), **variants(shape), **rivals(shape)},
            error=error,
            limit=MLA_LIMIT,
            flops=shape.flops,
            num_bytes=shape.num_bytes,
            multiplied=torch.bfloat16,
        )
    )


def error_of_both(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of outputs and log-sum-exps side by side, `[t, h, dim + 1]`: each output, and a token's log-sum-exps together,
    of which a single one may be near 0."""
    return max(worst_row(got[..., :-1], want[..., :-1]), worst_row(got[..., -1], want[..., -1]))


def prefill_inputs(shape: Prefill, seed: int):
    q, k, v = (
        normal(shape.batch * length, shape.heads, dim, seed=3 * seed + i)
        for i, (length, dim) in enumerate(((shape.s_q, 192), (shape.s_k, 192), (shape.s_k, 128)))
    )
    sequence = torch.arange(shape.batch + 1, dtype=torch.int32, device=DEVICE)
    return q, k, v, sequence * shape.s_q, sequence * shape.s_k, SCALE, shape.causal


def prefill_error(shape: Prefill, arguments, out) -> float:
    """Of a few queries, each as a sequence of its own that ends with the last key it sees."""
    q, k, v, _, _, *options = arguments
    got, errors = out_and_lse(arguments, out), []
    for row in some_rows(q.shape[0], "cpu", at_most=16).tolist():
        sequence, position = divmod(row, shape.s_q)
        visible = shape.s_k - (shape.s_q - 1 - position if shape.causal else 0)
        keys = slice(sequence * shape.s_k, sequence * shape.s_k + visible)
        ends = [torch.tensor([0, end], dtype=torch.int32, device=DEVICE) for end in (1, visible)]
        one = slice(row, row + 1)
        want = CASES["mla_prefill"].formula(torch.float64, q[one], k[keys], v[keys], *ends, *options)
        errors.append(error_of_both(got[one], want))
    return max(errors)


@pytest.mark.parametrize("shape", for_this_machine(PREFILL, PREFILL_STAND_INS), ids=str)
def test_mla_prefill(gpu_bench, shape: Prefill):
    gpu_bench(
        Case(
            op="mla_prefill",
            case=str(shape),
            make=partial(prefill_inputs, shape),
            providers=ours("mla_prefill"),
            error=partial(prefill_error, shape),
            limit=MLA_LIMIT,
            flops=shape.flops,
            num_bytes=shape.num_bytes,
            multiplied=torch.bfloat16,
        )
    )


def merge_inputs(shape: Heads, seed: int):
    """Two outputs that weigh about the same."""
    outs = [normal(shape.t, shape.heads, 128, seed=4 * seed + i) for i in range(2)]
    lses = [normal(shape.t, shape.heads, seed=4 * seed + 2 + i, dtype=torch.float32) for i in range(2)]
    return outs[0], lses[0], outs[1], lses[1]


def merge_error(arguments, out) -> float:
    return error_of_both(out_and_lse(arguments, out), CASES["merge_attn_states"].formula(torch.float64, *arguments))


@pytest.mark.parametrize("shape", for_this_machine(MERGE, HEADS_STAND_INS), ids=str)
def test_merge_attn_states(gpu_bench, shape: Heads):
    num_bytes = 3 * shape.t * shape.heads * (2 * 128 + 4)
    case = op_case("merge_attn_states", shape, partial(merge_inputs, shape), num_bytes=num_bytes)
    gpu_bench(replace(case, error=merge_error))
