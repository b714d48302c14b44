"""One benchmark case from inputs to a row of the results: measured, verified, and replayed into pytest-benchmark.

pytest-benchmark keeps the statistics, groups and comparisons between runs. Its clock is replaced: time advances by
the samples that deepseek_ops.bench took on the GPU.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import COMPILED_AT_FIRST_CALL, UNVERIFIED, Prepare
from benchmarks.report import OUT_OF_TIME, VARIANTS
from benchmarks.shapes import DEVICE
from deepseek_ops import bench
from deepseek_ops.bench import Call, Ceilings, Measurement
from deepseek_ops.numeric import FP8
from deepseek_ops.op_table import CASES
from deepseek_ops.op_table import worst_row as worst_row
from deepseek_ops.registry import OPS

OURS = "deepseek_ops"
SCHEMA = 1
"""Of the results file: see benchmarks/report.py."""


class ReplayClock:
    """A clock that stands still until a sample is replayed."""

    __name__ = "replayed_samples"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = ReplayClock()


@dataclass(frozen=True)
class Case:
    """What is to be measured."""

    op: str
    case: str
    make: Callable[[int], tuple[Any, ...]]
    """From a seed to an input set, random but never zero."""
    providers: Mapping[str, Prepare]
    """Ours first."""
    error: Callable[[tuple[Any, ...], Any], float]
    """The worst row's relative error of an output, against float64, from its input set."""
    limit: float
    """What the error of a correct output stays under."""
    flops: float
    num_bytes: float
    """The fewest bytes that a call must move."""
    multiplied: torch.dtype = FP8
    """What the tensor cores multiply, which says how fast they can be."""


def called(op: str, *flags: bool, writes: int | None = None) -> Prepare:
    """The op, on its arguments by position and these `flags` after them.

    An op that writes into an argument returns nothing: its calls return that argument, the one at `writes`.
    """

    def prepare(*arguments: Any) -> Call:
        def call() -> object:
            returned = OPS[op](*arguments, *flags)
            return returned if writes is None else arguments[writes]

        return call

    return prepare


def ours(op: str, writes: int | None = None) -> dict[str, Prepare]:
    """The provider under test: the op itself."""
    return {OURS: called(op, writes=writes)}


def op_case(
    op: str, shape: object, make: Callable[[int], tuple[Any, ...]], *, num_bytes: float, flops: float = 0
) -> Case:
    """A case of moving bytes, whose truth and plain-torch rival is the formula of the op table."""
    row = CASES[op]
    return Case(
        op=op,
        case=str(shape),
        make=make,
        providers={
            **ours(op),
            "copy": copying(num_bytes),
            "torch": lambda *arguments: partial(row.formula, torch.float32, *arguments),
        },
        error=lambda arguments, out: worst_row(row.result(arguments, out), row.formula(torch.float64, *arguments)),
        limit=row.limit,
        flops=flops,
        num_bytes=num_bytes,
    )


def copying(num_bytes: float) -> Prepare:
    """A kernel that reads half as many bytes and writes as many again."""

    def prepare(*_: Any) -> Call:
        source, target = torch.ones(2, max(1, int(num_bytes) // 8), device=DEVICE)
        return lambda: torch.neg(source, out=target)

    return prepare


def run_once(case: Case) -> float:
    """Calls our op on one input set, in each way that is measured, and verifies it; returns the error."""
    inputs = case.make(0)
    errors = {provider: case.error(inputs, case.providers[provider](*inputs)()) for provider in of_ours(case)}
    check(case, errors)
    return max(errors.values())


def of_ours(case: Case) -> list[str]:
    return [provider for provider in case.providers if provider in (OURS, *VARIANTS)]


def check(case: Case, errors: Mapping[str, float]) -> None:
    """A peer may be wrong or absent, ours may not."""
    for provider in of_ours(case):
        assert provider in errors, f"{case.op} at {case.case}: {provider} did not run"
        error = errors[provider]
        assert error <= case.limit, f"{case.op} at {case.case}: error {error:.1e} > {case.limit:.0e} ({provider})"


def run(case: Case, device: str, ceilings: Ceilings, **options: Any) -> tuple[Measurement, dict[str, Any]]:
    """Measures all providers, verifies the buffers that were timed, and returns the row of the results."""
    watch = Stopwatch()
    inputs = [case.make(seed) for seed in range(bench.num_input_sets(case.num_bytes))]
    watch.lap("inputs")
    calls, absent = {}, {}
    for provider, prepare in case.providers.items():
        try:
            calls[provider] = [prepare(*x) for x in inputs]
        except Exception as failure:
            if provider == OURS:
                raise
            absent[provider] = bench.reason(failure)
    watch.lap("prepare")
    measured = bench.measure(calls, device=device, **options)
    watch.lap("measure")
    measured.absent.update(absent)
    errors = {
        provider: max(case.error(x, out) for x, out in ends(inputs, outputs))
        for provider, outputs in measured.outputs.items()
        if provider not in UNVERIFIED
    }
    watch.lap("verify")
    row = {**describe(case, measured, errors, ceilings), "seconds": watch.laps}
    check(case, errors)
    return measured, row


def compile_peers(case: Case) -> None:
    """Calls each peer that compiles itself once, so that a later run of this case finds it compiled."""
    for provider in case.providers.keys() & COMPILED_AT_FIRST_CALL:
        with contextlib.suppress(Exception):  # the run itself records what is wrong
            case.providers[provider](*case.make(0))()


class Stopwatch:
    """Where the host's seconds of a case go."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self.last, 3)
        self.last = now


def ends(inputs: list[tuple[Any, ...]], outputs: list[object]) -> list[tuple[tuple[Any, ...], object]]:
    """The first and the last input set with what was computed from it."""
    done = [(x, out) for x, out in zip(inputs, outputs, strict=True) if out is not None]
    return done[:1] + done[1:][-1:]


def describe(case: Case, measured: Measurement, errors: Mapping[str, float], ceilings: Ceilings) -> dict[str, Any]:
    """The row: see benchmarks/report.py for what its keys mean."""
    floor = ceilings.floor(case.flops, case.num_bytes, case.multiplied)
    providers: dict[str, Any] = {provider: {"absent": why} for provider, why in measured.absent.items()}
    for provider, samples in measured.samples.items():
        median = measured.median(provider)
        providers[provider] = {
            "median_us": median * 1e6,
            "iqr_us": measured.iqr(provider) * 1e6,
            "n": len(samples),
            "samples_us": [round(x * 1e6, 4) for x in samples],
            "timer": measured.clocks[provider],
            "tflops": case.flops / median / 1e12,
            "gbps": case.num_bytes / median / 1e9,
            "share_of_floor": floor / median,
        }
        if provider != OURS:
            ratio = measured.ratio(provider)
            providers[provider]["ratio"] = [ratio.median, ratio.low, ratio.high]
        if provider in UNVERIFIED:
            providers[provider]["note"] = UNVERIFIED[provider]
        else:
            providers[provider] |= {"error": errors[provider], "correct": errors[provider] <= case.limit}
    noise = measured.noise
    return {
        "op": case.op,
        "case": case.case,
        "flops": case.flops,
        "bytes": case.num_bytes,
        "floor_us": floor * 1e6,
        "limit": case.limit,
        "a_a": [noise.median, noise.low, noise.high],
        "gpu_state": measured.gpu_state,
        "providers": providers,
    }


class Results:
    """The rows of a session. Written after each, so that a run which is cut short keeps what it has."""

    def __init__(self, path: Path | None, device: str, seconds: float = math.inf) -> None:
        self.path = path
        self.device = device
        self.deadline = time.monotonic() + seconds
        self.longest = 0.0
        self._ceilings: Ceilings | None = None
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "cases": [],
            "missing": [],
            "host": [],
            "generation": [],
            "steps": [],
        }

    @property
    def ceilings(self) -> Ceilings:
        """Measured at the first need, in the same run as everything that they are compared with."""
        if self._ceilings is None:
            self._ceilings = bench.ceilings(self.device)
            self.content["conditions"] = bench.conditions(self.device)
            self.content["ceilings"] = vars(self._ceilings)
        return self._ceilings

    def measure(self, case: Case) -> Measurement | None:
        """Runs a case and keeps its row; None where one as long as the longest so far would end after the deadline.

        A case that is not begun, or fails, is listed as missing.
        """
        if time.monotonic() + self.longest > self.deadline:
            self._add_missing(case, OUT_OF_TIME)
            return None
        ceilings, start = self.ceilings, time.monotonic()
        try:
            measured, row = run(case, self.device, ceilings)
        except Exception as failure:
            self._add_missing(case, bench.reason(failure))
            raise
        self.longest = max(self.longest, time.monotonic() - start)
        self.add({**row, "date": self.content["conditions"]["date"]})
        return measured

    def add(self, row: dict[str, Any]) -> None:
        self.content["cases"].append(row)
        self._write()

    def _add_missing(self, case: Case, why: str) -> None:
        self.content["missing"].append({"op": case.op, "case": case.case, "why": why})
        self._write()

    def add_host(self, call: str, microseconds: float) -> None:
        self.content["host"].append({"call": call, "us": microseconds})
        self._write()

    def add_generation(self, model: str, batch: int, tokens_per_second: float) -> None:
        row = {"model": model, "batch": batch, "tokens_per_second": tokens_per_second}
        self.content["generation"].append(row)
        self._write()

    def add_step(self, row: dict[str, Any]) -> None:
        self.content["steps"].append(row)
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=generator(seed), device=DEVICE).to(dtype)


def some_rows(m: int, device: str, at_most: int = 64) -> Tensor:
    """Row indices to verify: the first, the last and some between."""
    return torch.linspace(0, m - 1, min(m, at_most), device=device).long()
