"""How time is measured here: CUDA graphs that rotate over cold inputs, providers interleaved, medians with spread.

A sample is the GPU time of one call. Each provider's calls are captured in a CUDA graph that goes round input sets
which together exceed the L2 cache; the graphs are replayed in turn, in a new random order each round, so that a ratio
is taken under the same clocks. The first provider runs twice a round: its ratio to itself (A/A) is the noise. What
cannot be captured is timed by events behind a flush and a backlog; on a CPU the host's clock is read, and the samples
are labelled with it.

A clock turns a provider's calls into a `Timed`, which runs them and says how long one took; tests bring their own.
"""

from __future__ import annotations

import hashlib
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .gpu_state import Watch
from .library import build_info
from .numeric import FP8, align, ceil_div
from .registry import OPS

__all__ = [
    "Call",
    "Ceilings",
    "Clock",
    "CudaEventClock",
    "CudaGraphClock",
    "HostClock",
    "Measurement",
    "Ratio",
    "Timed",
    "backend",
    "ceilings",
    "conditions",
    "measure",
    "num_input_sets",
]

Call = Callable[[], object]
"""A call of an op on inputs of its own; returns what it computed."""

COLD_BYTES = 300_000_000
"""What the rotated input sets must exceed: five times the 60 MB L2 cache of an H200."""
MAX_INPUT_SETS = 256
REPETITIONS = 10
"""Calls in a graph, at least: so many that one launch of the graph does not count."""
REPLAYS = 15
WARM_UP = 0.5
"""Seconds for which all providers run in turn before the first sample: the power limit must have lowered the clocks."""


def num_input_sets(num_bytes: float) -> int:
    """How many input sets of `num_bytes` a rotation needs so that each call finds its inputs out of the L2 cache."""
    return max(1, min(ceil_div(COLD_BYTES, max(1, int(num_bytes))), MAX_INPUT_SETS))


# ---------------------------------------------------------------------------------------------------- clocks


class Timed(Protocol):
    """A provider's calls, ready to run."""

    outputs: list[object]
    """What the last run computed, one entry per input set: the timed buffers themselves."""

    def run(self) -> float:
        """Runs the calls and returns the seconds that one of them took."""


class Clock(Protocol):
    name: str

    def prepare(self, calls: Sequence[Call]) -> Timed:
        """Warms the calls up; raises where they cannot be timed this way."""


class HostClock:
    """The host's clock around calls that finish before they return: for CPU tensors."""

    name = "perf_counter"

    def prepare(self, calls: Sequence[Call]) -> Timed:
        return _HostTimed(calls)


class _HostTimed:
    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.outputs: list[object] = [call() for call in calls]

    def run(self) -> float:
        start = time.perf_counter()
        self.outputs = [call() for call in self.calls]
        return (time.perf_counter() - start) / len(self.calls)


class CudaGraphClock:
    """GPU events around the replay of a CUDA graph of the calls."""

    name = "cuda graph"

    def prepare(self, calls: Sequence[Call]) -> Timed:
        return _GraphTimed(calls)


class _GraphTimed:
    def __init__(self, calls: Sequence[Call]) -> None:
        _warm_up_on_side_stream(calls)
        self.repetitions = align(max(REPETITIONS, len(calls)), len(calls))
        self.outputs: list[object] = [None] * len(calls)
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self.graph):
                for i in range(self.repetitions):
                    self.outputs[i % len(calls)] = calls[i % len(calls)]()
        except RuntimeError:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream behind
            raise
        _poison(self.outputs)
        self.events = _Events()

    def run(self) -> float:
        self.events.start()
        self.graph.replay()
        return self.events.stop() / self.repetitions


class CudaEventClock:
    """GPU events around a single call whose inputs were flushed from the L2 cache: where capture is impossible."""

    name = "cuda events"

    def prepare(self, calls: Sequence[Call]) -> Timed:
        return _EventTimed(calls)


class _EventTimed:
    def __init__(self, calls: Sequence[Call]) -> None:
        _warm_up_on_side_stream(calls)
        self.calls = calls
        self.outputs: list[object] = [None] * len(calls)
        self.turn = 0
        self.scratch = torch.empty(COLD_BYTES, dtype=torch.uint8, device="cuda")
        self.events = _Events()

    def run(self) -> float:
        self.scratch.zero_()
        self.events.start()
        self.outputs[self.turn] = self.calls[self.turn]()
        self.turn = (self.turn + 1) % len(self.calls)
        return self.events.stop()


class _Events:
    """A pair of GPU events. The start waits behind a backlog, so that what follows is queued before it begins."""

    BACKLOG_CYCLES = 200_000  # about 0.1 ms, more than it takes to launch a graph

    def __init__(self) -> None:
        self.first = torch.cuda.Event(enable_timing=True)
        self.last = torch.cuda.Event(enable_timing=True)

    def start(self) -> None:
        torch.cuda._sleep(self.BACKLOG_CYCLES)
        self.first.record()

    def stop(self) -> float:
        self.last.record()
        self.last.synchronize()
        return self.first.elapsed_time(self.last) * 1e-3


def _warm_up_on_side_stream(calls: Sequence[Call]) -> None:
    """Lazy initialisation (handles, workspaces, compilation) must happen before capture and on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (calls[0], *calls):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _poison(outputs: Sequence[object]) -> None:
    """Overwrites the outputs, so that what is verified afterwards was written by a timed run."""
    for x in outputs:
        if isinstance(x, tuple | list):
            _poison(x)
        elif isinstance(x, Tensor):
            x.fill_(float("nan") if x.dtype.is_floating_point else 1)


def default_clocks(device: str) -> list[Clock]:
    """The clocks to try for calls on `device`, best first."""
    return [CudaGraphClock(), CudaEventClock()] if device.startswith("cuda") else [HostClock()]


# ------------------------------------------------------------------------------------------------ statistics


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    @staticmethod
    def paired(numerators: Sequence[float], denominators: Sequence[float], resamples: int = 1000) -> Ratio:
        ratios = np.asarray(numerators, dtype=np.float64) / np.asarray(denominators, dtype=np.float64)
        drawn = np.random.default_rng(0).choice(ratios, (resamples, ratios.size))
        low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
        return Ratio(float(np.median(ratios)), float(low), float(high))


@dataclass
class Measurement:
    """What `measure` saw. The first provider is the one that the others are compared with."""

    samples: dict[str, list[float]]
    """Provider -> seconds of one call, one sample per round."""
    again: list[float]
    """The first provider's second run of each round."""
    clocks: dict[str, str]
    """Provider -> the name of the clock."""
    outputs: dict[str, list[object]]
    """Provider -> the timed buffers, one entry per input set."""
    absent: dict[str, str] = field(default_factory=dict)
    """Provider that could not be run -> why."""
    gpu_state: dict[str, Any] = field(default_factory=dict)
    """Clocks, power, temperature and throttle reasons while the samples were taken."""

    @property
    def first(self) -> str:
        return next(iter(self.samples))

    def median(self, provider: str) -> float:
        return statistics.median(self.samples[provider])

    def iqr(self, provider: str) -> float:
        low, _, high = statistics.quantiles(self.samples[provider], n=4, method="inclusive")
        return high - low

    def ratio(self, provider: str) -> Ratio:
        """How many times as long as the first provider `provider` takes."""
        return Ratio.paired(self.samples[provider], self.samples[self.first])

    @property
    def noise(self) -> Ratio:
        """A/A: the first provider against itself."""
        return Ratio.paired(self.again, self.samples[self.first])


def measure(
    calls: Mapping[str, Sequence[Call]],
    *,
    device: str = "cuda",
    replays: int = REPLAYS,
    warm_up: float = WARM_UP,
    clocks: Sequence[Clock] | None = None,
) -> Measurement:
    """Times the calls of each provider, interleaved.

    Args:
        calls: provider -> its calls, one per input set. The first provider is compared with the others.
        device: where the calls run; chooses the clocks.
        replays: rounds, each of which gives one sample per provider (two of the first).
        warm_up: seconds for which all run in turn before the first sample.
        clocks: tried in this order for each provider, instead of the device's.

    Returns:
        The samples. A provider other than the first that fails is listed in `absent` with the reason.

    Raises:
        ValueError: fewer than two replays.
        Exception: whatever the first provider raised.
    """
    if replays < 2:
        raise ValueError(f"replays must be 2 or more, got {replays}")
    clocks = clocks or default_clocks(device)
    first = next(iter(calls))
    timed: dict[str, Timed] = {}
    names: dict[str, str] = {}
    absent: dict[str, str] = {}
    for provider, provider_calls in calls.items():
        try:
            timed[provider], names[provider] = _prepare(provider_calls, clocks)
        except Exception as failure:
            if provider == first:
                raise
            absent[provider] = reason(failure)

    _warm_up([x.run for x in timed.values()], warm_up)
    samples: dict[str, list[float]] = {provider: [] for provider in timed}
    again: list[float] = []
    order = [(timed[provider], samples[provider]) for provider in timed] + [(timed[first], again)]
    shuffle = random.Random(0).shuffle
    with Watch(device) as watch:
        for _ in range(replays):
            shuffle(order)
            for calls_of, taken in order:
                taken.append(calls_of.run())
    outputs = {provider: x.outputs for provider, x in timed.items()}
    return Measurement(samples, again, names, outputs, absent, watch.summary())


def reason(failure: BaseException) -> str:
    """One line that says why something did not run."""
    return " ".join(f"{type(failure).__name__}: {failure}".split())[:200]


def _prepare(calls: Sequence[Call], clocks: Sequence[Clock]) -> tuple[Timed, str]:
    for clock in clocks[:-1]:
        try:
            return clock.prepare(calls), clock.name
        except RuntimeError:
            continue  # cannot be captured
    return clocks[-1].prepare(calls), clocks[-1].name


def _warm_up(runs: Sequence[Callable[[], float]], seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for run in runs:
            run()


# ------------------------------------------------------------------------------------------------ conditions


def backend(op: str, device: str) -> str:
    """What runs when `op` is called on `device`: "kernel sm90a", "reference on CUDA" or "reference on CPU"."""
    if not device.startswith("cuda"):
        return "reference on CPU"
    return "kernel sm90a" if OPS[op].runs_kernel_on(torch.device(device)) else "reference on CUDA"


def _nvidia_smi(fields: Sequence[str]) -> list[str]:
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]


def _parse_smi(fields: Sequence[str], output: str) -> dict[str, str]:
    values = [value.strip() for value in output.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def conditions(device: str) -> dict[str, Any]:
    """Under which circumstances figures are taken: device, versions, revision."""
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": build_info.get("nvcc"),
        "version": build_info["version"],
        **revision(),
        "data": "normal, quantized where the op takes FP8",
    }
    if device.startswith("cuda"):
        found["device"] = torch.cuda.get_device_name()
        static = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")
        found |= _parse_smi(static, _output(_nvidia_smi(static)) or "")
    return found


SOURCE = Path(__file__).resolve().parent.parent


def revision(root: Path = SOURCE) -> dict[str, Any]:
    """The git revision, whether tracked files differ from it, and a hash of csrc/; None for what is not there."""
    head = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    status = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return {
        "git_revision": head.strip() if head else None,
        "git_dirty": bool(status.strip()) if head and status is not None else None,
        "csrc_sha256": _hash_of(root / "csrc"),
    }


def _hash_of(folder: Path) -> str | None:
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(x for x in folder.rglob("*") if x.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _output(command: Sequence[str]) -> str | None:
    """What a command prints, or None where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None


# -------------------------------------------------------------------------------------------------- ceilings


@dataclass(frozen=True)
class Ceilings:
    """What this machine does at best, measured; a floor of time follows from it."""

    copy_gbps: float
    """A large copy on the device, bytes read plus bytes written."""
    read_gbps: float
    """A sum over a large tensor: reading alone is faster."""
    fp8_tflops: float | None
    """cuBLASLt's FP8 GEMM with one scale, 8192 x 8192 x 8192, random data; None on a CPU."""
    bf16_tflops: float | None = None
    """The same in bfloat16."""

    def floor(self, flops: float, num_bytes: float, multiplied: torch.dtype = FP8) -> float:
        """The seconds that neither arithmetic on `multiplied` values nor memory allows to go below."""
        tflops = self.fp8_tflops if multiplied == FP8 else self.bf16_tflops
        arithmetic = flops / (tflops * 1e12) if tflops else 0.0
        return max(arithmetic, num_bytes / (max(self.copy_gbps, self.read_gbps) * 1e9))


def ceilings(device: str, *, clocks: Sequence[Clock] | None = None) -> Ceilings:
    """Measures the ceilings of `device` with the same harness as everything else."""
    on_gpu = device.startswith("cuda")
    source, target = torch.randn(2, 1 << 29 if on_gpu else 1 << 24, device=device)

    def seconds(call: Call) -> float:
        return measure({"it": [call]}, device=device, clocks=clocks).median("it")

    # A kernel's copy: in a graph, copy_ becomes a node of the copy engine, which is slower.
    copy_gbps = 2 * source.nbytes / seconds(lambda: torch.neg(source, out=target)) / 1e9
    read_gbps = source.nbytes / seconds(lambda: source.sum()) / 1e9
    if not on_gpu:
        return Ceilings(copy_gbps, read_gbps, None)
    n = 8192
    operands = [torch.randn(2, n, n, device=device, dtype=torch.bfloat16) for _ in range(3)]
    fp8, bf16 = (
        2 * n**3 / measure({"it": calls}, device=device, clocks=clocks).median("it") / 1e12
        for calls in ([tensorwise_gemm(*x.to(FP8)) for x in operands], [bf16_gemm(*x) for x in operands])
    )
    return Ceilings(copy_gbps, read_gbps, fp8, bf16)


def bf16_gemm(a: Tensor, b: Tensor) -> Call:
    return lambda: a @ b.T


def tensorwise_gemm(a: Tensor, b: Tensor) -> Call:
    """cuBLASLt's `a @ b.T` of FP8 operands with one scale each: less work than block scaling, so an upper mark."""
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
