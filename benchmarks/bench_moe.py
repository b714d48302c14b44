"""Routing around the experts: choose 8 of 256, order the rows, gather them and add them up again."""

from __future__ import annotations

import pytest
import torch

import deepseek_ops
from benchmarks.harness import generator, normal, op_case
from benchmarks.shapes import DEVICE, HIDDEN, NUM_EXPERTS, NUM_TOPK, TOKENS, TOKENS_STAND_INS, for_this_machine

TOKEN_COUNTS = pytest.mark.parametrize("t", for_this_machine(TOKENS, TOKENS_STAND_INS), ids=lambda t: f"{t} tokens")
WIDTH = for_this_machine((HIDDEN,), (384,))[0]


def routing(t: int, seed: int) -> torch.Tensor:
    chance = torch.rand(t, NUM_EXPERTS, generator=generator(seed), device=DEVICE)
    return chance.topk(NUM_TOPK, dim=-1).indices.int()


@TOKEN_COUNTS
def test_moe_gate(gpu_bench, t: int):
    bias = normal(NUM_EXPERTS, seed=0, dtype=torch.float32) / 8
    make = lambda seed: (normal(t, NUM_EXPERTS, seed=seed, dtype=torch.float32), bias, 8, 8, 4, "sigmoid", True, 2.5)
    gpu_bench(op_case("moe_gate", f"{t} tokens", make, num_bytes=t * (4 * NUM_EXPERTS + 8 * NUM_TOPK)))


@TOKEN_COUNTS
def test_moe_mapping(gpu_bench, t: int):
    make = lambda seed: (routing(t, seed), NUM_EXPERTS, 1)
    gpu_bench(op_case("moe_mapping", f"{t} tokens", make, num_bytes=16 * t * NUM_TOPK))


@TOKEN_COUNTS
def test_moe_permute(gpu_bench, t: int):
    def make(seed: int):
        token_idx = deepseek_ops.moe_mapping(routing(t, seed), NUM_EXPERTS)[0]
        return normal(t, WIDTH, seed=seed), token_idx

    gpu_bench(op_case("moe_permute", f"{t} tokens", make, num_bytes=2 * t * WIDTH * (1 + NUM_TOPK)))


@TOKEN_COUNTS
def test_moe_unpermute(gpu_bench, t: int):
    def make(seed: int):
        row_idx = deepseek_ops.moe_mapping(routing(t, seed), NUM_EXPERTS)[1]
        weights = torch.rand(t, NUM_TOPK, generator=generator(seed), device=DEVICE)
        return normal(t * NUM_TOPK, WIDTH, seed=seed), row_idx, weights

    gpu_bench(op_case("moe_unpermute", f"{t} tokens", make, num_bytes=2 * t * WIDTH * (1 + NUM_TOPK)))
