"""RMSNorm and SwiGLU, alone and fused with the quantization that follows."""

from __future__ import annotations

import pytest

from benchmarks.harness import normal, op_case
from benchmarks.shapes import ACTIVATION, NORM, ROWS_STAND_INS, Rows, for_this_machine

NORM_SHAPES = pytest.mark.parametrize("shape", for_this_machine(NORM, ROWS_STAND_INS), ids=str)
ACTIVATION_SHAPES = pytest.mark.parametrize("shape", for_this_machine(ACTIVATION, ROWS_STAND_INS), ids=str)


def operands(shape: Rows, seed: int, num_inputs: int):
    inputs = [normal(shape.m, shape.k, seed=3 * seed + i) for i in range(num_inputs)]
    return (*inputs, 1 + normal(shape.k, seed=3 * seed + 2) / 8, 1e-6)


@NORM_SHAPES
def test_rms_norm(gpu_bench, shape: Rows):
    make = lambda seed: operands(shape, seed, 1)
    gpu_bench(op_case("rms_norm", shape, make, num_bytes=4 * shape.m * shape.k))


@NORM_SHAPES
def test_add_rms_norm(gpu_bench, shape: Rows):
    make = lambda seed: operands(shape, seed, 2)
    gpu_bench(op_case("add_rms_norm", shape, make, num_bytes=8 * shape.m * shape.k))


@NORM_SHAPES
def test_rms_norm_cast_to_fp8(gpu_bench, shape: Rows):
    make = lambda seed: (*operands(shape, seed, 1), False, True)
    gpu_bench(op_case("rms_norm_cast_to_fp8", shape, make, num_bytes=3 * shape.m * shape.k))


@NORM_SHAPES
def test_add_rms_norm_cast_to_fp8(gpu_bench, shape: Rows):
    make = lambda seed: (*operands(shape, seed, 2), False, True)
    gpu_bench(op_case("add_rms_norm_cast_to_fp8", shape, make, num_bytes=7 * shape.m * shape.k))


@ACTIVATION_SHAPES
def test_silu_mul(gpu_bench, shape: Rows):
    make = lambda seed: (normal(shape.m, 2 * shape.k, seed=seed),)
    gpu_bench(op_case("silu_mul", shape, make, num_bytes=6 * shape.m * shape.k))


@ACTIVATION_SHAPES
def test_silu_mul_cast_to_fp8(gpu_bench, shape: Rows):
    make = lambda seed: (normal(shape.m, 2 * shape.k, seed=seed), False, True)
    gpu_bench(op_case("silu_mul_cast_to_fp8", shape, make, num_bytes=5 * shape.m * shape.k))
