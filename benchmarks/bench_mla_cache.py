"""The paged latent cache of MLA, bfloat16 and FP8: writing a step's tokens, and reading whole contexts back."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.bench_mla import PAGE_SIZE, in_format
from benchmarks.bench_rope import MAX_POSITION
from benchmarks.harness import Case, generator, normal, op_case, ours, worst_row
from benchmarks.shapes import (
    CACHE_GATHER,
    CACHE_GATHER_STAND_INS,
    CACHE_WRITE,
    CACHE_WRITE_STAND_INS,
    CACHED_TOKEN,
    DEVICE,
    Cached,
    for_this_machine,
)
from deepseek_ops.numeric import FP8, ceil_div
from deepseek_ops.op_table import BF16, CASES, cached, token_quantized
from deepseek_ops.quantize import cast_to_fp8
from deepseek_ops.rope import rope_cos_sin

FP8_WRITE_LIMIT = 2e-2
"""A last bit of a run's largest latent changes its scale, and with it a few of its codes: 1e-2 of the row."""


def pool(num_pages: int, cache: str, seed: int) -> tuple[torch.Tensor, float]:
    return in_format(cache, normal(num_pages, PAGE_SIZE, 576, seed=seed))


def write_inputs(shape: Cached, seed: int):
    """Tokens at positions of their own, to slots in random order of a cache with as much room again."""
    t = shape.batch * shape.s_k
    kv_cache, kv_scale = pool(2 * ceil_div(t, PAGE_SIZE), shape.cache, 4 * seed)
    positions = torch.randperm(MAX_POSITION, generator=generator(seed), device=DEVICE)[:t]
    slots = torch.randperm(kv_cache.shape[0] * PAGE_SIZE, generator=generator(seed), device=DEVICE)[:t]
    return (
        normal(t, 512, seed=4 * seed + 1),
        normal(t, 64, seed=4 * seed + 2),
        positions,
        rope_cos_sin(MAX_POSITION, 64, device=DEVICE),
        slots,
        kv_cache,
        1 + normal(512, seed=4 * seed + 3) / 8,
        1e-6,
        True,
        kv_scale,
    )


def write_error(arguments, kv_cache: torch.Tensor) -> float:
    """Of the rows that were to be written, by latents and rotated channels."""
    *tokens, slots, _, weight, eps, interleaved, kv_scale = arguments
    order = torch.arange(len(slots), device=DEVICE)
    alone = torch.empty(len(slots), 1, 576, dtype=torch.bfloat16, device=DEVICE)
    written = CASES["mla_cache_write"].formula
    want = written(torch.float64, *tokens, order, alone, weight, eps, interleaved).squeeze(1)
    if kv_cache.dtype == FP8:
        want[:, :512] = want[:, :512].bfloat16()  # as the norm's result; what is rotated is rounded once
        want = cast_to_fp8((want / kv_scale).float()).double() * kv_scale
    latents, rotated = want.split([512, 64], -1)
    if kv_cache.dtype == torch.uint8:
        latents = token_quantized(torch.float64, latents.bfloat16())
    got = kv_scale * cached(torch.float64, kv_cache).flatten(0, 1)[slots]
    return max(worst_row(got[:, :512], latents), worst_row(got[:, 512:], rotated))


@pytest.mark.parametrize("shape", for_this_machine(CACHE_WRITE, CACHE_WRITE_STAND_INS), ids=str)
def test_mla_cache_write(gpu_bench, shape: Cached):
    """A token moves its 576 channels in and its row out, its position, its slot, and one row of the table."""
    num_bytes = shape.batch * shape.s_k * (2 * 576 + CACHED_TOKEN[shape.cache] + 8 + 8 + 4 * 64) + 2 * 512
    gpu_bench(
        Case(
            op="mla_cache_write",
            case=str(shape),
            make=partial(write_inputs, shape),
            providers=ours("mla_cache_write", writes=5),
            error=write_error,
            limit=BF16 if shape.cache == "bf16" else FP8_WRITE_LIMIT,
            flops=0,
            num_bytes=num_bytes,
        )
    )


def gather_inputs(shape: Cached, seed: int):
    """The pages of all requests lie in random order."""
    pages = ceil_div(shape.s_k, PAGE_SIZE)
    order = torch.randperm(shape.batch * pages, generator=generator(seed), device=DEVICE)
    cu_seqlens = torch.arange(shape.batch + 1, dtype=torch.int32, device=DEVICE) * shape.s_k
    kv_cache, kv_scale = pool(shape.batch * pages, shape.cache, seed)
    table, total = order.int().view(shape.batch, pages), shape.batch * shape.s_k
    return kv_cache, table, cu_seqlens, total, torch.bfloat16, kv_scale


@pytest.mark.parametrize("shape", for_this_machine(CACHE_GATHER, CACHE_GATHER_STAND_INS), ids=str)
def test_mla_cache_gather(gpu_bench, shape: Cached):
    """A token moves its row in and 576 channels out; a page its entry of the table."""
    token, page = CACHED_TOKEN[shape.cache] + 2 * 576, 4
    num_bytes = shape.batch * (shape.s_k * token + ceil_div(shape.s_k, PAGE_SIZE) * page)
    gpu_bench(op_case("mla_cache_gather", shape, partial(gather_inputs, shape), num_bytes=num_bytes))
