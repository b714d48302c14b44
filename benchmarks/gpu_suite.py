"""Everything that needs a GPU, in one command, offline: tests, sanitizer, benches, and the results file of it all.

    python benchmarks/gpu_suite.py [--quick] [--peers DIR] [--output DIR]        (make gpu)

Each stage has a time budget. A stage that fails is recorded and the next one runs. The exit code is not zero if the
tests or the sanitizer failed, or if no figure was taken.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402

WORK = ROOT / "build" / "gpu"
"""Where the stages leave their logs and figures."""


@dataclass(frozen=True)
class Stage:
    name: str
    command: Sequence[str]
    seconds: float
    """Its time budget."""


@dataclass(frozen=True)
class Outcome:
    status: str
    """passed, failed or timed out."""
    seconds: float
    detail: str
    """The end of what it printed, where it did not pass."""


def stages(quick: bool, peers: Path | None, work: Path = WORK) -> list[Stage]:
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    benches = [*pytest, "benchmarks", "--results", str(work / "benches.json")]
    benches += ["--quick"] if quick else []
    benches += ["--peers", str(peers)] if peers else []
    tests = (*pytest, "tests", "-m", "gpu", f"--junitxml={work / 'tests.xml'}")
    sanitizer = (python, str(ROOT / "tests" / "sanitizer.py"), "--json", str(work / "sanitizer.json"))
    return [
        Stage("tests", tests, 150),
        Stage("sanitizer", sanitizer, 80),
        Stage("benches", benches, 90 if quick else 240),
    ]


def run_stage(stage: Stage, work: Path = WORK) -> Outcome:
    """Runs a stage in a process group of its own, its output into a log; ends the group at the end of the budget."""
    start = time.monotonic()
    log = work / f"{stage.name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "passed" if process.wait(stage.seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").replace(f"{ROOT}/", "").strip().splitlines()
    detail = "" if status == "passed" else "\n".join(lines[-4:])  # the log has the rest
    return Outcome(status, round(time.monotonic() - start, 1), detail)


def count_tests(junit: Path) -> dict[str, int] | None:
    """How many tests passed, failed, had errors and were skipped; None where pytest left no record."""
    if not junit.is_file():
        return None
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(junit).getroot().iter("testsuite"):
        for key in totals:
            totals[key] += int(suite.get(key, 0))
    ran = totals["tests"] - totals["failures"] - totals["errors"] - totals["skipped"]
    return {"passed": ran, "failed": totals["failures"], "errors": totals["errors"], "skipped": totals["skipped"]}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def collect(outcomes: dict[str, Outcome], work: Path = WORK) -> dict[str, Any]:
    """One results file from what the stages left behind; benchmarks/report.py says what is in it."""
    return {
        "schema": 1,
        "cases": [],
        "host": [],
        "generation": [],
        **read_json(work / "benches.json"),
        "stages": {name: vars(outcome) for name, outcome in outcomes.items()},
        "tests": count_tests(work / "tests.xml") or {},
        "sanitizer": read_json(work / "sanitizer.json"),
    }


def results_name(gpu: str) -> str:
    """ "NVIDIA H200" -> "h200.json"."""
    model = re.search(r"[a-z]+\d+\w*", gpu.lower().removeprefix("nvidia"))
    return f"{model[0] if model else re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def exit_code(outcomes: dict[str, Outcome], results: dict[str, Any]) -> int:
    checked = all(outcomes[name].status == "passed" for name in ("tests", "sanitizer"))
    return 0 if checked and results["cases"] else 1


def main(
    argv: Sequence[str] | None = None,
    *,
    gpu: str | None = None,
    run: Callable[[Stage, Path], Outcome] = run_stage,
    work: Path = WORK,
    target: Path = ROOT / "benchmarks" / "results",
) -> int:
    parser = argparse.ArgumentParser(description="Everything that needs a GPU.")
    parser.add_argument("--quick", action="store_true", help="a quarter of the benches")
    parser.add_argument("--peers", type=Path, help="folder with other implementations to run beside ours")
    parser.add_argument("--output", type=Path, default=target, help="folder for the results file")
    options = parser.parse_args(argv)
    gpu = gpu or find_gpu()
    if gpu is None:
        print("gpu_suite: no GPU here", file=sys.stderr)
        return 2
    work.mkdir(parents=True, exist_ok=True)
    for left_over in ("tests.xml", "sanitizer.json", "benches.json"):
        (work / left_over).unlink(missing_ok=True)

    outcomes = {}
    for stage in stages(options.quick, options.peers and options.peers.resolve(), work):
        print(f"{stage.name}: up to {stage.seconds:.0f} s ...", flush=True)
        outcome = outcomes[stage.name] = run(stage, work)
        print(f"{stage.name}: {outcome.status} in {outcome.seconds} s", flush=True)
        if outcome.detail:
            print(outcome.detail, flush=True)

    results = collect(outcomes, work)
    path = options.output / results_name(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    if results["cases"]:
        print(report.short_table(results))
    print(report.checks(results))
    print(f"written: {path}")
    return exit_code(outcomes, results)


def find_gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


if __name__ == "__main__":
    sys.exit(main())
