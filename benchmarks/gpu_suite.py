"""Everything that needs a GPU, in one command, offline: tests, sanitizer, benches, and the results file of it all.

    python benchmarks/gpu_suite.py [--peers DIR] [--output DIR]        (make gpu)
    python benchmarks/gpu_suite.py --stages benches --bench gemm,grouped_gemm --cases 'REGEX' --seconds 300

Each stage has a time budget. A stage that fails is recorded and the next one runs. The exit code is not zero if the
tests or the sanitizer failed, or if no figure was taken.

What a run leaves out stays in the results file from runs before it, if those ran the same csrc/ on the same machine:
several short runs make one file. Anything else starts the file anew.
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


BENCHES = {
    path.stem.removeprefix("bench_"): path
    for path in sorted(
        (ROOT / "benchmarks").glob("bench_*.py"), key=lambda path: (path.stem == "bench_decode_step", path)
    )
}
"""Family of ops -> its benches; whole models, which take the longest, come last."""
SECONDS = 210
LAST_CASE = 30
"""Seconds after the benches' time in which the case that runs may end."""


def stages(
    work: Path = WORK,
    *,
    benches: Sequence[str] = tuple(BENCHES),
    cases: str = "",
    seconds: float = SECONDS,
    quick: bool = False,
    peers: Path | None = None,
) -> list[Stage]:
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    files = [str(BENCHES[family].relative_to(ROOT)) for family in benches]
    bench = [*pytest, *files, "--results", str(work / "benches.json"), "--seconds", str(seconds)]
    bench += ["--cases", cases] if cases else []
    bench += ["--quick"] if quick else []
    bench += ["--peers", str(peers)] if peers else []
    tests = (*pytest, "tests", "-m", "gpu", f"--junitxml={work / 'tests.xml'}")
    sanitizer = (python, str(ROOT / "tests" / "sanitizer.py"), "--json", str(work / "sanitizer.json"))
    return [
        Stage("tests", tests, 480),
        Stage("sanitizer", sanitizer, 150),
        Stage("benches", bench, seconds + LAST_CASE),
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


def collect(outcomes: dict[str, Outcome], conditions: dict[str, Any], work: Path = WORK) -> dict[str, Any]:
    """One run's results from what its stages left behind; benchmarks/report.py says what is in them."""
    return {
        "schema": 1,
        "cases": [],
        "missing": [],
        "host": [],
        "generation": [],
        "steps": [],
        "conditions": conditions,
        **read_json(work / "benches.json"),
        "stages": {name: vars(outcome) for name, outcome in outcomes.items()},
        "tests": count_tests(work / "tests.xml") or {},
        "sanitizer": read_json(work / "sanitizer.json"),
    }


SAME = ("csrc_sha256", "device", "driver_version", "cuda", "torch")
"""The conditions that results in one file share."""


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new`, and of `old` what `new` does not have; `new` alone if they are not of the same sources and machine.

    A case that fails now is not shown with the figures of a time when it passed.
    """
    theirs = old.get("conditions", {})
    if old.get("schema") != new["schema"] or any(theirs.get(key) != new["conditions"].get(key) for key in SAME):
        return new
    case, call, batch = ("op", "case"), ("call",), ("model", "batch")
    failed = [x for x in new["missing"] if x["why"] != report.OUT_OF_TIME]
    cases = union(without(old["cases"], failed, case), new["cases"], case)
    measured = {key: new[key] for key in ("conditions", "ceilings") if "ceilings" in new}
    return {
        **old,
        **measured,
        "cases": cases,
        "missing": without(union(old.get("missing", []), new["missing"], case), cases, case),
        "host": union(old["host"], new["host"], call),
        "generation": union(old["generation"], new["generation"], batch),
        "steps": union(old.get("steps", []), new.get("steps", []), batch),
        "stages": {**old.get("stages", {}), **new["stages"]},
        "tests": new["tests"] or old["tests"],
        "sanitizer": new["sanitizer"] or old["sanitizer"],
    }


Rows = list[dict[str, Any]]


def union(old: Rows, new: Rows, keys: Sequence[str]) -> Rows:
    """The rows of both in the order of their first appearance, `new`'s where both have one of the same keys."""
    rows = {tuple(row[key] for key in keys): row for row in (*old, *new)}
    return list(rows.values())


def without(rows: Rows, others: Rows, keys: Sequence[str]) -> Rows:
    gone = {tuple(row[key] for key in keys) for row in others}
    return [row for row in rows if tuple(row[key] for key in keys) not in gone]


def results_name(gpu: str) -> str:
    """ "NVIDIA H200" -> "h200.json"."""
    model = re.search(r"[a-z]+\d+\w*", gpu.lower().removeprefix("nvidia"))
    return f"{model[0] if model else re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def exit_code(outcomes: dict[str, Outcome], new: dict[str, Any]) -> int:
    checked = all(outcomes[name].status == "passed" for name in ("tests", "sanitizer") if name in outcomes)
    return 0 if checked and (new["cases"] or "benches" not in outcomes) else 1


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Reads a list like "a,b" of names that are known."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(known)}")
        return names

    return parse


def main(
    argv: Sequence[str] | None = None,
    *,
    gpu: str | None = None,
    run: Callable[[Stage, Path], Outcome] = run_stage,
    work: Path = WORK,
    target: Path = ROOT / "benchmarks" / "results",
) -> int:
    parser = argparse.ArgumentParser(description="Everything that needs a GPU.")
    known = [stage.name for stage in stages()]
    parser.add_argument("--stages", type=names_of(known), default=known, help=f"some of {','.join(known)}")
    parser.add_argument("--bench", type=names_of([*BENCHES]), default=[*BENCHES], help=f"some of {','.join(BENCHES)}")
    parser.add_argument("--cases", metavar="REGEX", default="", help="only bench cases in whose name this is found")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for the benches (default: %(default)s)")
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
    conditions = find_conditions()

    outcomes = {}
    peers = options.peers and options.peers.resolve()
    chosen = {"benches": options.bench, "cases": options.cases, "seconds": options.seconds, "quick": options.quick}
    for stage in stages(work, peers=peers, **chosen):
        if stage.name not in options.stages:
            continue
        print(f"{stage.name}: up to {stage.seconds:.0f} s ...", flush=True)
        outcome = outcomes[stage.name] = run(stage, work)
        print(f"{stage.name}: {outcome.status} in {outcome.seconds} s", flush=True)
        if outcome.detail:
            print(outcome.detail, flush=True)

    new = collect(outcomes, conditions, work)
    path = options.output / results_name(gpu)
    results = merge(read_json(path), new)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    if new["cases"]:
        print(report.short_table(new))
        print(report.seconds_table(new))
    for case in results["missing"]:
        print(f"not measured: {case['op']} {case['case']} ({case['why']})")
    print(report.checks(results))
    print(f"written: {path}, {len(results['cases'])} cases, {len(new['cases'])} of them now")
    return exit_code(outcomes, new)


def find_conditions() -> dict[str, Any]:
    import torch

    from deepseek_ops import bench

    return bench.conditions("cuda" if torch.cuda.is_available() else "cpu")


def find_gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


if __name__ == "__main__":
    sys.exit(main())
