"""How an op says that its input is wrong: one sentence with op, argument, what was wanted and what came.

A wrong type (not a tensor, wrong dtype) is a `TypeError`; anything else a `ValueError`. The checks look at
metadata only (shape, stride, dtype, device), so they hold for real and for fake tensors alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

__all__ = ["Checker"]

Extent = int | str
"""A wanted extent: a number, or a name such as "m" where any number will do."""


class Checker:
    """Checks the arguments of one call; remembers the device that the first tensor sets for the others."""

    def __init__(self, op: str) -> None:
        self.op = op
        self._device: torch.device | None = None
        self._device_of = ""

    def tensor(
        self,
        name: str,
        x: object,
        shape: Sequence[Extent] | None = None,
        dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
        *,
        min_dim: int = 0,
        max_dim: int | None = None,
    ) -> tuple[int, ...]:
        """Checks a tensor argument and returns its shape.

        `shape` fixes the rank; a number in it is a wanted extent, a string names a free one. Without `shape`
        any rank from `min_dim` to `max_dim` is taken.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.op}: {name} must be a Tensor, got {type(x).__name__}")
        dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
        if dtypes is not None and x.dtype not in dtypes:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            self.fail(name, wanted, str(x.dtype).removeprefix("torch."), TypeError)
        if x.layout != torch.strided or x.is_conj() or x.is_neg():
            self.fail(name, "a plain strided tensor", _kind(x))
        if self._device is None:
            self._device, self._device_of = x.device, name
        elif x.device != self._device:
            self.fail(name, f"on {self._device} like {self._device_of}", str(x.device))
        got = tuple(x.shape)
        if shape is None:
            if len(got) < min_dim:
                self.fail(name, f"of {min_dim} or more dimensions", _list(got))
            if max_dim is not None and len(got) > max_dim:
                self.fail(name, f"of at most {max_dim} dimensions", _list(got))
        elif len(got) != len(shape) or any(not isinstance(w, str) and w != g for w, g in zip(shape, got, strict=True)):
            self.fail(name, _list(shape), _list(got))
        return got

    def row_stride(self, name: str, x: Tensor, num_bytes: int, *, distinct: bool = False) -> None:
        """The last dimension must be contiguous, and each row must start at a multiple of `num_bytes`.

        `distinct`: rows must not overlap either, as TMA asks.
        """
        size = x.element_size()
        if x.numel() == 0:
            return
        if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
            self.fail(name, "contiguous in its last dimension", f"strides {_list(x.stride())}")
        if x.storage_offset() * size % num_bytes:
            self.fail(name, f"aligned to {num_bytes} bytes", f"a storage offset of {x.storage_offset() * size} bytes")
        for extent, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            if extent > 1 and (stride * size % num_bytes or stride < 0):
                self.fail(name, f"of row strides that are multiples of {num_bytes} bytes", f"{_list(x.stride())}")
            if distinct and extent > 1 and stride < x.shape[-1]:
                self.fail(name, "of rows that do not overlap", f"strides {_list(x.stride())}")

    def contiguous(self, name: str, x: Tensor) -> None:
        if not x.is_contiguous():
            self.fail(name, "contiguous", f"strides {_list(x.stride())}")

    def writable(self, name: str, x: Tensor, *inputs: Tensor) -> None:
        """An output: its elements must not overlap one another, nor an input's."""
        if any(extent > 1 and stride == 0 for extent, stride in zip(x.shape, x.stride(), strict=True)):
            self.fail(name, "free of internal overlap", f"strides {_list(x.stride())}")
        for other in inputs:
            if _overlap(x, other):
                self.fail(name, "apart from the inputs in memory", "a view of the same memory")

    def true(self, condition: bool, name: str, wanted: str, got: object) -> None:
        """For relations that have no method of their own: `name` must be `wanted`."""
        if not condition:
            self.fail(name, wanted, got)

    def fail(self, name: str, wanted: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"{self.op}: {name} must be {wanted}, got {got}")


def _list(extents: Sequence[Extent]) -> str:
    return f"[{', '.join(map(str, extents))}]"


def _kind(x: Tensor) -> str:
    if x.layout != torch.strided:
        return str(x.layout).removeprefix("torch.")
    return "a conjugate view" if x.is_conj() else "a negative view"


def _overlap(x: Tensor, y: Tensor) -> bool:
    if x.numel() == 0 or y.numel() == 0 or x.untyped_storage()._cdata != y.untyped_storage()._cdata:
        return False
    (x_first, x_last), (y_first, y_last) = _byte_range(x), _byte_range(y)
    return x_first < y_last and y_first < x_last


def _byte_range(x: Tensor) -> tuple[int, int]:
    first = int(x.storage_offset() * x.element_size())
    last = int(sum((extent - 1) * stride for extent, stride in zip(x.shape, x.stride(), strict=True)))
    return first, first + (last + 1) * x.element_size()
