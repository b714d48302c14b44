"""What must hold for every op, whatever it computes; tests/samples has a call of each."""

import inspect

import pytest
import torch
from torch.library import opcheck

import deepseek_ops
from deepseek_ops.registry import OPS
from tests.samples import BAD_INPUT, SAMPLES
from tests.support import bits, clones, outputs


def test_every_op_has_a_sample_and_a_bad_input():
    assert set(SAMPLES) == set(OPS)
    assert {bad.op for bad in BAD_INPUT} == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_is_public_under_its_own_name_and_documented(op):
    function = getattr(deepseek_ops, op)
    assert op in deepseek_ops.__all__
    assert all(f"{section}:\n" in function.__doc__ for section in ("Args", "Raises")), f"{op}: incomplete docstring"
    assert ("Returns:\n" in function.__doc__) == (not OPS[op].schema.endswith("()"))
    described = function.__doc__.split("Args:")[1]
    for argument in inspect.signature(function).parameters:
        assert argument in described, f"{op}: {argument} is not described"


@pytest.mark.parametrize("op", OPS)
def test_opcheck_passes(op, device, monkeypatch):
    allclose = torch.allclose  # with which opcheck looks for mutated inputs; it has no arithmetic on FP8

    def allclose_or_same_bits(x, y, **options):
        return torch.equal(bits(x), bits(y)) if x.dtype == torch.float8_e4m3fn else allclose(x, y, **options)

    monkeypatch.setattr(torch, "allclose", allclose_or_same_bits)
    opcheck(OPS[op].overload, SAMPLES[op](device))


@pytest.mark.parametrize("op", OPS)
def test_compiles_into_one_graph_with_the_same_bits(op, device):
    args = SAMPLES[op](device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: OPS[op](*a), fullgraph=True, backend="aot_eager")
    for got, want in zip(outputs(compiled, clones(args)), outputs(OPS[op], clones(args)), strict=True):
        assert torch.equal(bits(got), bits(want))


class Call(torch.nn.Module):
    """An op as a module, which is what torch.export takes; what is no tensor is fixed."""

    def __init__(self, op, args):
        super().__init__()
        self.op, self.args = op, args

    def forward(self, *tensors):
        given = iter(tensors)
        return OPS[self.op](*(next(given) if isinstance(x, torch.Tensor) else x for x in self.args))


@pytest.mark.parametrize("op", OPS)
def test_exports(op, device):
    args = SAMPLES[op](device)
    given = tuple(x for x in clones(args) if isinstance(x, torch.Tensor))
    program = torch.export.export(Call(op, args), given)
    exported = program.module()
    for got, want in zip(outputs(exported, clones(given)), outputs(OPS[op], clones(args)), strict=True):
        assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("op", OPS)
def test_gives_the_same_bits_twice(op, device):
    args = SAMPLES[op](device)
    for first, second in zip(outputs(OPS[op], clones(args)), outputs(OPS[op], clones(args)), strict=True):
        assert torch.equal(bits(first), bits(second))


@pytest.mark.parametrize("op", OPS)
def test_refuses_inputs_that_require_gradients(op):
    args = SAMPLES[op]("cpu")
    floats = [x for x in args if isinstance(x, torch.Tensor) and x.dtype in (torch.float32, torch.bfloat16)]
    if not floats:
        pytest.skip("takes no tensor that could require a gradient")
    floats[0].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{op}: inputs must not require gradients"):
        OPS[op](*args)
    with torch.no_grad():
        OPS[op](*args)
