"""Every op is whole: a new one that lacks a part on any floor is named here, with the part."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deepseek_ops
from deepseek_ops.op_table import CASES
from deepseek_ops.registry import OPS
from tests.samples import BAD_INPUT, SAMPLES

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
op_index = importlib.import_module("op_index")


def module_of(op):
    return importlib.import_module(getattr(deepseek_ops, op).__module__)


@pytest.mark.parametrize("op", OPS)
def test_op_is_public_where_it_is_promised(op):
    function, module = getattr(deepseek_ops, op), module_of(op)
    assert op in deepseek_ops.__all__
    assert op in module.__all__
    assert function.__name__ == op
    assert module.__name__.count(".") == 1, "ops live in deepseek_ops/<family>.py"


@pytest.mark.parametrize("op", OPS)
def test_op_has_its_parts(op):
    assert callable(OPS[op].check)
    assert callable(OPS[op].fake)
    assert callable(OPS[op].reference)
    assert OPS[op].reference is not OPS[op].fake
    assert op in SAMPLES, f"tests/samples/ has no call of {op}"
    assert [bad for bad in BAD_INPUT if bad.op == op], f"tests/samples/ has no bad input of {op}"
    assert op in CASES, f"deepseek_ops/op_table.py has no case of {op}"


@pytest.mark.parametrize("op", OPS)
def test_op_is_typed_and_takes_what_its_schema_takes(op):
    signature = inspect.signature(getattr(deepseek_ops, op))
    assert signature.return_annotation is not inspect.Signature.empty
    for name, parameter in signature.parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty, f"{op}: {name} has no type"
    in_schema = re.findall(r"(\w+)(?:=[^,)]*)?(?=[,)])", OPS[op].schema.split("->")[0])
    public = set(signature.parameters)
    # What only the public function has must have a default there: it is turned into something the schema takes.
    assert not [p for p in public - set(in_schema) if signature.parameters[p].default is inspect.Parameter.empty]


@pytest.mark.parametrize("op", OPS)
def test_op_that_writes_declares_it_and_returns_nothing(op):
    schema = OPS[op].schema
    writes = "!" in schema
    assert writes == schema.rstrip().endswith("()"), "an op writes into an argument or returns, not both"
    if op.endswith("_out"):
        assert writes
        assert op.removesuffix("_out") in OPS


@pytest.mark.parametrize("op", OPS)
def test_op_has_a_test_file_of_its_own(op):
    path = ROOT / op_index.test_of(op)
    assert path.is_file(), f"{op} belongs into {path.name}"
    assert re.search(rf"\b{op}\b", path.read_text()), f"{path.name} does not mention {op}"


@pytest.mark.parametrize("op", OPS)
def test_op_has_a_bench(op):
    """What writes into `out` counts with the op that allocates it."""
    assert op_index.bench_of(op), f"no benchmarks/bench_*.py measures {op}"


@pytest.mark.parametrize("op", sorted(op_index.kernels()))
def test_op_with_a_kernel_has_the_kernel_s_parts(op):
    assert op in OPS, "csrc/torch/register.cpp names an op that Python does not define"
    kernel = op_index.kernel_of(op)
    assert (ROOT / kernel).is_file(), f"{op}: {kernel} does not exist"
    declared = (ROOT / "csrc/torch/ops.h").read_text()
    assert re.search(rf"\b{op}\(", declared), "declared in csrc/torch/ops.h"


def test_every_kernel_is_used():
    kernels = {path.stem for path in (ROOT / "csrc/kernels").glob("*.cuh")}
    named = {op_index.kernel_of(op).stem for op in op_index.kernels()}
    assert named <= kernels
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cu*"))
    included = set(re.findall(r'#include "kernels/(\w+)\.cuh"', sources))
    assert kernels == named | included, f"kernels that nothing uses: {sorted(kernels - named - included)}"


@pytest.mark.skipif(not deepseek_ops.build_info["cuda"], reason="built without the CUDA kernels")
def test_build_holds_the_kernels_that_the_sources_register():
    assert {op for op in OPS if OPS[op].has_kernel} == op_index.kernels()


def test_readme_lists_every_op():
    subprocess.run([sys.executable, ROOT / "tools/op_index.py", "--check"], check=True, cwd=ROOT)
