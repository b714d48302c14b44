"""The rotation of queries and keys, each token by the angles of its position."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.harness import generator, normal, op_case
from benchmarks.shapes import DEVICE, HEADS_STAND_INS, ROPE, Heads, for_this_machine
from deepseek_ops.rope import rope_cos_sin

MAX_POSITION = 4096
DIM = 64


def inputs(shape: Heads, seed: int):
    """Each token at a position of its own, and a table for this input set alone, so that it is cold too."""
    positions = torch.randperm(MAX_POSITION, generator=generator(seed), device=DEVICE)[: shape.t]
    return normal(shape.t, shape.heads, DIM, seed=seed), positions, rope_cos_sin(MAX_POSITION, DIM, device=DEVICE), True


@pytest.mark.parametrize("shape", for_this_machine(ROPE, HEADS_STAND_INS), ids=str)
def test_rope(gpu_bench, shape: Heads):
    """A token moves its channels twice, its position, and one row of the table."""
    num_bytes = shape.t * (4 * shape.heads * DIM + 8 + 4 * DIM)
    gpu_bench(op_case("rope", shape, partial(inputs, shape), num_bytes=num_bytes))
