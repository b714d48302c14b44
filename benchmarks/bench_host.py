"""What a call costs the host, in microseconds: on a GPU until it is enqueued, on a CPU with the reference's work.

The inputs are the tests' smallest. `torch.add` of one element is the yardstick.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from benchmarks.shapes import DEVICE, GPU
from deepseek_ops.bench import backend
from deepseek_ops.registry import OPS
from tests.samples import SAMPLES

CALLS, ROUNDS = (100, 20) if GPU else (10, 5)


@pytest.fixture
def host_bench(benchmark, results) -> Callable[[str, Callable[[], object]], None]:
    """Times rounds of calls on the host; the GPU's queue is empty when a round begins, and never fills up."""

    def measure(name: str, call: Callable[[], object]) -> None:
        if benchmark.disabled:
            benchmark.pedantic(call)
            return

        def round_of_calls() -> None:
            for _ in range(CALLS):
                call()

        sync = torch.cuda.synchronize if GPU else None
        benchmark.pedantic(round_of_calls, setup=sync, rounds=ROUNDS, warmup_rounds=2)
        microseconds = benchmark.stats.stats.median / CALLS * 1e6
        benchmark.extra_info.update(calls_per_round=CALLS, us_per_call=microseconds)
        results.add_host(name, microseconds)

    return measure


def test_yardstick(host_bench):
    one = torch.ones(1, device=DEVICE)
    host_bench("torch.add", lambda: torch.add(one, one))


@pytest.mark.parametrize("op", OPS)
def test_eager_call(host_bench, op: str):
    if GPU and not backend(op, DEVICE).startswith("kernel"):
        pytest.skip(f"{op} has no kernel for this GPU: the reference's many launches would be timed")
    host_bench(op, partial(OPS[op], *SAMPLES[op](DEVICE)))


@pytest.mark.parametrize("op", OPS)
def test_check(host_bench, op: str):
    """The typed errors' share, which the reference pays at each call and a kernel only when it refuses one."""
    host_bench(f"{op}: check", partial(OPS[op].check, *SAMPLES[op](DEVICE)))
