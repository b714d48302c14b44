"""pytest benchmarks [--results FILE] [--peers DIR] [--quick]: the GPU time of every op at DeepSeek shapes.

On a CPU, or with --benchmark-disable, each bench calls its op once on a small stand-in and verifies the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.harness import CLOCK, Case, Results, run, run_once
from benchmarks.shapes import DEVICE, GPU
from deepseek_ops.bench import backend

RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write the measured figures to this JSON file")
    parser.addoption("--peers", type=Path, help="folder with other implementations to run beside ours")
    parser.addoption("--quick", action="store_true", help="one case in four")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results(config.getoption("--results"), DEVICE)
    peers.folder = config.getoption("--peers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        items[:] = items[::4]
    for item in items:
        if "gpu_bench" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK, group=item.name.partition("[")[0]))


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Results:
    """Where the session's figures are collected."""
    return request.config.stash[RESULTS]


@pytest.fixture
def gpu_bench(benchmark, results: Results) -> Callable[[Case], None]:
    """Measures a case on the GPU and verifies what was timed; without one, runs it once and verifies."""

    def measure_and_replay(case: Case) -> None:
        if not GPU or benchmark.disabled:
            start = time.perf_counter()
            benchmark.extra_info["error"] = run_once(case)
            samples = [time.perf_counter() - start] * 2
            benchmark.extra_info["timer"] = "one call and its verification, host clock: no figure of speed"
        elif not backend(case.op, DEVICE).startswith("kernel"):
            pytest.skip(f"{case.op} has no kernel for this GPU: only the reference would be timed")
        else:
            measured, row = run(case, DEVICE, results.ceilings)
            results.add(row)
            samples = measured.samples[measured.first]
            benchmark.extra_info.update({key: value for key, value in row.items() if key != "providers"})
        replay = iter(samples)
        benchmark.pedantic(lambda: CLOCK.advance(next(replay)), rounds=1 if benchmark.disabled else len(samples))

    return measure_and_replay
