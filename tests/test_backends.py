"""Which code runs where: the kernel on a GPU that it was built for, the reference everywhere else."""

import pytest
import torch

from deepseek_ops.registry import OPS
from tests.samples import SAMPLES
from tests.support import bits, clones

WITH_KERNEL = [name for name, op in OPS.items() if op.has_kernel]


def through_cuda_key(name, args):
    """Calls what is registered for CUDA; with CPU tensors it finds no Hopper GPU behind them."""
    return OPS[name].overload.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)


def tensors(*results):
    return [x for result in results for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


@pytest.mark.skipif(not WITH_KERNEL, reason="built without CUDA")
@pytest.mark.parametrize("name", WITH_KERNEL)
def test_a_kernel_hands_over_to_the_reference_where_there_is_no_hopper_gpu(name):
    args = SAMPLES[name]("cpu")
    copies = clones(args)
    got, want = through_cuda_key(name, args), OPS[name](*copies)
    for x, y in zip(tensors(got), tensors(want), strict=True):
        assert torch.equal(bits(x), bits(y))
    for x, y in zip(args, copies, strict=True):
        if isinstance(x, torch.Tensor):
            assert torch.equal(bits(x), bits(y))


@pytest.mark.skipif(not WITH_KERNEL, reason="built without CUDA")
@pytest.mark.parametrize("name", WITH_KERNEL)
def test_handing_over_leaks_no_tensor(name):
    args = SAMPLES[name]("cpu")
    first = args[0]
    before = first._use_count()
    for _ in range(100):
        through_cuda_key(name, args)
    assert first._use_count() == before


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_something_to_run_on_cuda(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"deepseek_ops::{name}", "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"deepseek_ops::{name}", "CPU")
