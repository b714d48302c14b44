"""FP8 quantization of activations and weights, and back: bytes moved are all that counts."""

from __future__ import annotations

import pytest
import torch

import deepseek_ops
from benchmarks.harness import normal, op_case
from benchmarks.shapes import QUANTIZE, ROWS_STAND_INS, SCALES, WEIGHTS, Rows, for_this_machine
from deepseek_ops.numeric import BLOCK, ceil_div
from deepseek_ops.quantize import AMAX_FLOOR

SHAPES = pytest.mark.parametrize("shape", for_this_machine(QUANTIZE, ROWS_STAND_INS), ids=str)
WEIGHT_SHAPES = pytest.mark.parametrize("shape", for_this_machine(WEIGHTS, ROWS_STAND_INS), ids=str)
SCALE_SHAPES = pytest.mark.parametrize("shape", for_this_machine(SCALES, ROWS_STAND_INS), ids=str)


@SHAPES
def test_cast_to_fp8(gpu_bench, shape: Rows):
    """Of values of which some are too large for FP8."""
    make = lambda seed: (256 * normal(shape.m, shape.k, seed=seed),)
    gpu_bench(op_case("cast_to_fp8", shape, make, num_bytes=3 * shape.m * shape.k))


@SHAPES
def test_per_token_cast_to_fp8(gpu_bench, shape: Rows):
    make = lambda seed: (normal(shape.m, shape.k, seed=seed), False, True, AMAX_FLOOR)
    num_bytes = shape.m * (3 * shape.k + 4 * ceil_div(shape.k, BLOCK))
    gpu_bench(op_case("per_token_cast_to_fp8", shape, make, num_bytes=num_bytes))


@SHAPES
def test_per_token_cast_from_fp8(gpu_bench, shape: Rows):
    make = lambda seed: (*deepseek_ops.per_token_cast_to_fp8(normal(shape.m, shape.k, seed=seed)), torch.bfloat16)
    num_bytes = shape.m * (3 * shape.k + 4 * ceil_div(shape.k, BLOCK))
    gpu_bench(op_case("per_token_cast_from_fp8", shape, make, num_bytes=num_bytes))


@SHAPES
def test_per_block_cast_to_fp8(gpu_bench, shape: Rows):
    make = lambda seed: (normal(shape.m, shape.k, seed=seed), False, AMAX_FLOOR)
    num_bytes = 3 * shape.m * shape.k + 4 * ceil_div(shape.m, BLOCK) * ceil_div(shape.k, BLOCK)
    gpu_bench(op_case("per_block_cast_to_fp8", shape, make, num_bytes=num_bytes))


@WEIGHT_SHAPES
def test_per_block_cast_from_fp8(gpu_bench, shape: Rows):
    make = lambda seed: (*deepseek_ops.per_block_cast_to_fp8(normal(shape.m, shape.k, seed=seed)), torch.bfloat16)
    num_bytes = 3 * shape.m * shape.k + 4 * ceil_div(shape.m, BLOCK) * ceil_div(shape.k, BLOCK)
    gpu_bench(op_case("per_block_cast_from_fp8", shape, make, num_bytes=num_bytes))


@SCALE_SHAPES
def test_to_mn_major_tma_aligned(gpu_bench, shape: Rows):
    blocks = ceil_div(shape.k, BLOCK)
    make = lambda seed: (normal(shape.m, blocks, seed=seed, dtype=torch.float32),)
    gpu_bench(op_case("to_mn_major_tma_aligned", shape, make, num_bytes=8 * shape.m * blocks))
