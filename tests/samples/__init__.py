"""Small valid calls of every op, and invalid ones, by family.

A family's module has `SAMPLES`: op name -> function(device) -> the op's arguments by position, and `BAD_INPUT`: a list
of `Bad`. tests/test_every_op.py and tests/test_bad_input.py run them on every backend.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Bad:
    """A call that must fail: `change` turns the op's sample arguments into wrong ones."""

    op: str
    what: str
    change: Callable[..., Arguments]
    error: type[Exception]
    message: str
    """A regular expression that the message must match after "<op>: "."""

    def __str__(self) -> str:
        return f"{self.op}: {self.what}"


def replace(index: int, change: Callable[[Any], Any]) -> Callable[..., Arguments]:
    """For `Bad.change`: the sample's arguments with one of them changed."""
    return lambda *args: (*args[:index], change(args[index]), *args[index + 1 :])


SAMPLES: dict[str, Callable[[str], Arguments]] = {}
BAD_INPUT: list[Bad] = []


def _gather() -> None:
    for module in pkgutil.iter_modules(__path__):
        family = importlib.import_module(f"{__name__}.{module.name}")
        SAMPLES.update(family.SAMPLES)
        BAD_INPUT.extend(family.BAD_INPUT)


_gather()
