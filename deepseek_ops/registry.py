"""What an op is made of, and which backend runs it where.

An op is registered once, with everything that it promises: a schema, `check` (typed errors from metadata), `fake`
(the outputs' metadata) and `reference` (the formula in plain torch). The reference is the CPU backend and the
tests' oracle. On CUDA the kernel in `csrc/` runs where there is one for that GPU; elsewhere the reference does.

The kernels guard themselves against every input that `check` refuses, but with a terse message: the words are
written once, here in Python. When a kernel refuses a call, `Op.__call__` asks `check` for the sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .library import build_info, library_path

__all__ = ["OPS", "Op", "register_op"]

NAMESPACE = "deepseek_ops"

if tuple(map(int, torch.__version__.split(".")[:2])) < tuple(map(int, build_info["torch_min"].split("."))):
    raise ImportError(f"deepseek_ops needs torch {build_info['torch_min']} or newer, found {torch.__version__}")
torch.ops.load_library(library_path("torch"))

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Op:
    """A registered op. Calling it dispatches on the arguments' device."""

    name: str
    schema: str
    check: Callable[..., Any]
    fake: Callable[..., Any]
    reference: Callable[..., Any]
    has_kernel: bool
    """Whether this build holds a CUDA kernel for the op (it may still not be one for the GPU at hand)."""
    overload: Any

    def runs_kernel_on(self, device: torch.device) -> bool:
        """Whether a call on `device` runs the kernel, where it is for the arguments, and not the reference."""
        return self.has_kernel and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)

    def __call__(self, *args: Any) -> Any:
        if torch.is_grad_enabled():
            for x in args:
                if isinstance(x, Tensor) and x.requires_grad:
                    raise RuntimeError(
                        f"{self.name}: inputs must not require gradients, this op has no backward; "
                        "call it under torch.no_grad() or detach its inputs"
                    )
        try:
            return self.overload(*args)
        except RuntimeError:
            try:
                self.check(*args)
            except (TypeError, ValueError) as bad_input:
                raise bad_input from None
            raise


OPS: dict[str, Op] = {}
"""Every op by name, in the order of registration."""


def register_op(
    schema: str, *, check: Callable[..., Any], fake: Callable[..., Any], reference: Callable[..., Any]
) -> Op:
    """Registers `schema` ("name(Tensor x, ...) -> Tensor") under torch.ops.deepseek_ops.

    `check`, `fake` and `reference` take the schema's arguments, all by position. An op that writes into an argument
    returns nothing and its `fake` returns None.
    """
    name, _, signature = schema.partition("(")
    qualified = f"{NAMESPACE}::{name}"

    def run_reference(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return reference(*args, **kwargs)

    def run_fake(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return fake(*args, **kwargs)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run_reference, "CPU")
    torch.library.register_fake(qualified, run_fake, lib=_LIBRARY)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA")
    if has_kernel:
        # What a kernel hands over to on a GPU that it was not built for (csrc/torch/fallback.h).
        _LIBRARY.define(f"{name}_reference({signature}")
        _LIBRARY.impl(f"{name}_reference", run_reference, "CompositeExplicitAutograd")
    else:
        _LIBRARY.impl(name, run_reference, "CUDA")
    op = Op(name, schema, check, fake, reference, has_kernel, getattr(getattr(torch.ops, NAMESPACE), name).default)
    OPS[name] = op
    return op
