"""Bad input gets a typed error that names op, argument, wanted and got: the same on CPU, CUDA and fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek_ops.registry import OPS
from tests.samples import BAD_INPUT, SAMPLES
from tests.support import DEVICES, bits, clones, outputs


def call(bad, backend):
    if backend != "fake":
        return OPS[bad.op](*bad.change(*SAMPLES[bad.op](backend)))
    real = bad.change(*SAMPLES[bad.op]("cpu"))
    with FakeTensorMode() as mode:
        args = tuple(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in real)
        return OPS[bad.op](*args)


@pytest.mark.parametrize("backend", [*DEVICES, "fake"])
@pytest.mark.parametrize("bad", BAD_INPUT, ids=str)
def test_is_named_the_same_way_everywhere(bad, backend):
    with pytest.raises(bad.error, match=f"^{bad.op}: {bad.message}"):
        call(bad, backend)


@pytest.mark.parametrize("bad", BAD_INPUT, ids=str)
def test_leaves_the_process_able_to_compute(bad, device):
    args = SAMPLES[bad.op](device)
    want = outputs(OPS[bad.op], clones(args))
    with pytest.raises(bad.error):
        call(bad, device)
    for x, y in zip(outputs(OPS[bad.op], clones(args)), want, strict=True):
        assert torch.equal(bits(x), bits(y))


def test_there_are_at_least_seventy_cases():
    assert len(BAD_INPUT) >= 70
