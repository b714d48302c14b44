"""FP8 quantization of activations and weights: bytes moved are all that counts."""

from __future__ import annotations

import pytest

from benchmarks.harness import normal, op_case
from benchmarks.shapes import QUANTIZE, ROWS_STAND_INS, Rows, for_this_machine
from deepseek_ops.numeric import BLOCK, ceil_div
from deepseek_ops.quantize import AMAX_FLOOR

SHAPES = pytest.mark.parametrize("shape", for_this_machine(QUANTIZE, ROWS_STAND_INS), ids=str)


@SHAPES
def test_per_token_cast_to_fp8(gpu_bench, shape: Rows):
    make = lambda seed: (normal(shape.m, shape.k, seed=seed), False, True, AMAX_FLOOR)
    num_bytes = shape.m * (3 * shape.k + 4 * ceil_div(shape.k, BLOCK))
    gpu_bench(op_case("per_token_cast_to_fp8", shape, make, num_bytes=num_bytes))


@SHAPES
def test_per_block_cast_to_fp8(gpu_bench, shape: Rows):
    make = lambda seed: (normal(shape.m, shape.k, seed=seed), False, AMAX_FLOOR)
    num_bytes = 3 * shape.m * shape.k + 4 * ceil_div(shape.m, BLOCK) * ceil_div(shape.k, BLOCK)
    gpu_bench(op_case("per_block_cast_to_fp8", shape, make, num_bytes=num_bytes))
