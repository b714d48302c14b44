"""pytest benchmarks [--results FILE] [--peers DIR] [--seconds N]: the GPU time of every op at DeepSeek shapes.

A family of ops is a file, a case a test: `pytest benchmarks/bench_gemm.py --cases '(64|128) x .* x 7168'` takes a part.
On a CPU, or with --benchmark-disable, each bench calls its op once on a small stand-in and verifies the result.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.harness import CLOCK, Case, Results, compile_peers, run_once
from benchmarks.report import OUT_OF_TIME
from benchmarks.shapes import DEVICE, GPU
from deepseek_ops.bench import backend

RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write the measured figures to this JSON file")
    parser.addoption("--peers", type=Path, help="folder with other implementations to run beside ours")
    parser.addoption("--seconds", type=float, default=math.inf, help="begin no case that would end after this time")
    parser.addoption("--cases", metavar="REGEX", default="", help="only cases in whose name this is found")
    parser.addoption("--quick", action="store_true", help="one case in four")
    parser.addoption("--max-layers", type=int, metavar="N", help="of a model's layers; by default as many as fit")
    parser.addoption("--compile-peers", metavar="I/N", help="measure nothing: compile the peers of every Nth case")


def pytest_configure(config: pytest.Config) -> None:
    path = None if config.getoption("--compile-peers") else config.getoption("--results")
    config.stash[RESULTS] = Results(path, DEVICE, config.getoption("--seconds"))
    peers.folder = config.getoption("--peers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if re.search(config.getoption("--cases"), item.name)]
    if config.getoption("--quick"):
        items[:] = items[::4]
    if share := config.getoption("--compile-peers"):
        i, n = map(int, share.split("/"))
        items[:] = [item for item in items if has_peers(item)][i::n]
    for item in items:
        if "gpu_bench" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK, group=item.name.partition("[")[0]))


def has_peers(item: pytest.Item) -> bool:
    return hasattr(getattr(item, "module", None), "peers")


COMPILERS = min(8, (os.cpu_count() or 1) // 2)
COMPILE_SECONDS = 90


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compiles the peers of the cases to come in several processes: one by one takes longer than all measuring."""
    config = session.config
    idle = any(config.getoption(x) for x in ("--benchmark-disable", "--collect-only", "--compile-peers"))
    if GPU and config.getoption("--peers") and not idle and any(map(has_peers, session.items)):
        compile_in_parallel([sys.executable, "-m", "pytest", *config.invocation_params.args], COMPILERS)


def compile_in_parallel(command: Sequence[str], num_processes: int, seconds: float = COMPILE_SECONDS) -> None:
    """`command` once for each share of the cases. What is not compiled in time is compiled when it is measured."""
    end = time.monotonic() + seconds
    running = [
        subprocess.Popen(
            [*command, f"--compile-peers={i}/{num_processes}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for i in range(num_processes)
    ]
    for process in running:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Results:
    """Where the session's figures are collected."""
    return request.config.stash[RESULTS]


@pytest.fixture
def gpu_bench(request: pytest.FixtureRequest, benchmark, results: Results) -> Callable[[Case], None]:
    """Measures a case on the GPU and verifies what was timed; without one, runs it once and verifies."""
    only_compile = request.config.getoption("--compile-peers")

    def measure_and_replay(case: Case) -> None:
        if not GPU or benchmark.disabled:
            start = time.perf_counter()
            benchmark.extra_info["error"] = run_once(case)
            samples = [time.perf_counter() - start] * 2
            benchmark.extra_info["timer"] = "one call and its verification, host clock: no figure of speed"
        elif not backend(case.op, DEVICE).startswith("kernel"):
            pytest.skip(f"{case.op} has no kernel for this GPU: only the reference would be timed")
        elif only_compile:
            compile_peers(case)
            return
        else:
            measured = results.measure(case)
            if measured is None:
                pytest.skip(OUT_OF_TIME)
            samples = measured.samples[measured.first]
            row = results.content["cases"][-1]
            benchmark.extra_info.update({key: value for key, value in row.items() if key != "providers"})
        replay = iter(samples)
        benchmark.pedantic(lambda: CLOCK.advance(next(replay)), rounds=1 if benchmark.disabled else len(samples))

    return measure_and_replay
