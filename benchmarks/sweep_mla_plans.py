"""The time of every plausible plan of MLA decoding at many shapes, and the planner's constants fitted to them.

    python benchmarks/sweep_mla_plans.py [--output FILE] [--seconds N] [SHAPE ...]
    python benchmarks/sweep_mla_plans.py --fit FILE [FILE ...]

The first needs a GPU. For each shape, say 16x1x8192x128:fp8 (requests, queries, keys, heads, cache): plan
(cluster_size/num_parts/tile_rows) -> microseconds, the planner's choice, and its regret: by how much it takes longer
than the best. The second needs a C++ compiler instead: it prints the constants of csrc/launch/mla_decode_plan.cpp that
suit the times in such files best. It chooses among the plans that were timed, so a sweep must confirm them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import bench_mla  # noqa: E402
from benchmarks.shapes import (  # noqa: E402
    CACHED_TOKEN,
    DEVICE,
    GPU,
    MLA,
    MLA_BETWEEN,
    MLA_FP8,
    MLA_ONE_SCALE,
    Mla,
)
from deepseek_ops import bench  # noqa: E402
from deepseek_ops.library import library_path  # noqa: E402
from deepseek_ops.numeric import ceil_div  # noqa: E402
from tests.emulator.interface import MlaDecode, MlaDecodePlan, mla_decode_of, mla_workspace_bytes  # noqa: E402
from tests.test_gemm_plans import num_sms  # noqa: E402
from tests.test_mla_plans import run_plan  # noqa: E402

Plan = tuple[int, int, int]
"""cluster_size, num_parts, tile_rows."""
Results = Mapping[str, Any]
"""What a sweep writes."""

PLANNER = ROOT / "csrc" / "launch" / "mla_decode_plan.cpp"
NOISE = 0.02
"""What estimates are taken to be off by: so a fit does not rest on differences that rounding a constant undoes."""
CLUSTER_SIZES, TILE_ROWS, TILE_KEYS = (1, 2, 4, 8), (16, 64), 64

OFTEN_RUN = (*MLA, *(x for x in MLA_FP8 if replace(x, cache="bf16") in MLA), *MLA_ONE_SCALE)
SHAPES = (*OFTEN_RUN, *[x for x in (*MLA_BETWEEN, *MLA_FP8) if x not in OFTEN_RUN][::3])
"""The grid first, then a third of what the benchmarks have between its points: all of it would take too long."""


def name_of(shape: Mla) -> str:
    return f"{shape.batch}x{shape.s_q}x{shape.s_k}x{shape.heads}:{shape.cache}"


def shape_of(name: str) -> Mla:
    found = re.fullmatch(rf"(\d+)x(\d+)x(\d+)x(\d+):({'|'.join(CACHED_TOKEN)})", name)
    if found is None:
        raise argparse.ArgumentTypeError(f"{name}: a shape is BATCHxS_QxS_KxHEADS:{{{','.join(CACHED_TOKEN)}}}")
    return Mla(*map(int, found.groups()[:4]), found[5])


# ------------------------------------------------------------------------------------------------------- the sweep


def num_units(shape: Mla, tile_rows: int) -> int:
    """Tiles of rows of all requests."""
    return shape.batch * ceil_div(shape.s_q * shape.heads, tile_rows)


def is_legal(shape: Mla, plan: Plan, num_sms: int) -> bool:
    """Whether the planner may choose it: each share has a tile of keys, and several parts all run at once."""
    size, parts, tile_rows = plan
    fits = num_units(shape, tile_rows) * size * parts <= num_sms
    return size * parts <= ceil_div(shape.s_k, TILE_KEYS) and (parts == 1 or fits)


def is_plausible(shape: Mla, plan: Plan, num_sms: int) -> bool:
    """Ten rounds of CTAs, or a few CTAs with all the keys beside idle SMs, need not be timed."""
    size, parts, tile_rows = plan
    num_ctas, num_tiles = num_units(shape, tile_rows) * size * parts, ceil_div(shape.s_k, TILE_KEYS)
    return num_ctas <= 8 * num_sms and (num_ctas > num_sms // 2 or num_tiles <= 64 * size * parts)


def plans(shape: Mla, num_sms: int) -> list[Plan]:
    """Of each kernel and cluster size up to seven plausible ones, whose numbers of parts are about as far apart.

    Parts are added up eight at a time, so above eight only multiples of it are taken, and the most that there may be
    and that run at once: large clusters do not fill all SMs.
    """
    found: list[Plan] = []
    for tile_rows in TILE_ROWS:
        for size in CLUSTER_SIZES:
            every = [(size, parts, tile_rows) for parts in range(1, num_sms + 1)]
            every = [x for x in every if is_legal(shape, x, num_sms) and is_plausible(shape, x, num_sms)]
            if every:
                (_, least, _), (_, most, _) = every[0], every[-1]
                spread = [round(least * (most / least) ** (i / 5)) for i in range(5)]
                at_once = num_sms * (10 if size > 2 else 11) // 11 // size // num_units(shape, tile_rows)
                at_once = min(max(at_once, least), most)
                parts = sorted({most, at_once, *(x if x <= 8 else max(least, x // 8 * 8) for x in spread)})
                found += [(size, x, tile_rows) for x in parts]
    return found


def plan_of(name: str) -> Plan:
    size, parts, tile_rows = map(int, name.split("/"))
    return size, parts, tile_rows


def planned(call: MlaDecode) -> Plan:
    plan = MlaDecodePlan()
    assert ctypes.CDLL(library_path("kernels")).dso_plan_mla_decode(ctypes.byref(call), ctypes.byref(plan)) == 0
    return plan.cluster_size, plan.num_parts, plan.tile_rows


def sweep(shape: Mla) -> dict[str, Any]:
    calls, alive = [], []  # a call has pointers only
    for seed in range(bench.num_input_sets(shape.num_bytes)):
        *operands, scale, causal, offsets, head_dim_v, batch_invariant, kv_scale = bench_mla.inputs(shape, seed)
        q = operands[0]
        out, lse = q.new_empty(*q.shape[:-1], head_dim_v), q.new_empty(q.shape[:-1], dtype=torch.float32)
        alive += [*operands, out, lse]
        calls.append(mla_decode_of(operands, out, lse, scale, causal, offsets, batch_invariant, kv_scale))
    chosen = planned(calls[0])
    timed = dict.fromkeys([chosen, *plans(shape, num_sms())])  # the first one must run
    room = max(mla_workspace_bytes(num_units(shape, rows), size, parts, rows) for size, parts, rows in timed)
    workspace = torch.empty(room, dtype=torch.uint8, device=DEVICE)
    for call in calls:
        call.workspace = workspace.data_ptr()
    providers: dict[str, list[bench.Call]] = {}
    for size, parts, rows in timed:
        plan = MlaDecodePlan(size, parts, 0, rows, room)
        providers[f"{size}/{parts}/{rows}"] = [partial(run_plan, call, plan) for call in calls]
    measured = bench.measure(providers, device=DEVICE, replays=7, warm_up=0.05)
    return {
        "chosen": "/".join(map(str, chosen)),
        "us": {name: round(measured.median(name) * 1e6, 2) for name in measured.samples},
        "absent": measured.absent,
        "gpu_state": measured.gpu_state,
    }


def regret(row: Mapping[str, Any]) -> float:
    """By what share of the best plan's time the planner's choice takes longer."""
    return row["us"][row["chosen"]] / min(row["us"].values()) - 1


def summary(regrets: Mapping[str, float]) -> str:
    worst = max(regrets, key=lambda name: regrets[name])
    mean = sum(regrets.values()) / len(regrets)
    return f"{len(regrets)} shapes: mean regret {mean:.2%}, worst {regrets[worst]:.1%} ({worst})"


def sweep_all(shapes: Sequence[Mla], seconds: float, output: Path | None) -> None:
    results: dict[str, Any] = {"conditions": bench.conditions(DEVICE), "num_sms": num_sms(), "shapes": {}}
    deadline, longest = time.monotonic() + seconds, 0.0
    for i, shape in enumerate(shapes):
        start = time.monotonic()
        if start + longest > deadline:
            print("no time for", *map(name_of, shapes[i:]))
            break
        row = results["shapes"][name_of(shape)] = sweep(shape)
        best, us = min(row["us"].items(), key=lambda x: x[1])
        chosen = f"chosen {row['chosen']} {row['us'][row['chosen']]} us"
        print(f"{name_of(shape)}: {chosen}, best {best} {us} us, regret {regret(row):.1%}", flush=True)
        if output:
            output.write_text(json.dumps(results, indent=1) + "\n")
        torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - start)
    if results["shapes"]:
        print(summary({name: regret(row) for name, row in results["shapes"].items()}))


# --------------------------------------------------------------------------------------------------------- the fit


class Model:
    """The planner itself, compiled so that it takes its constants as an argument (mla_plan_model.cpp)."""

    def __init__(self) -> None:
        compiler = shutil.which("c++") or shutil.which("g++")
        if compiler is None:
            raise RuntimeError("no C++ compiler")
        # mock/ stands in for what only a GPU has.
        includes = [f"-I{ROOT / folder}" for folder in ("tests/host/mock", "csrc")]
        with tempfile.TemporaryDirectory() as folder:
            library = f"{folder}/model.so"
            source = ROOT / "benchmarks" / "mla_plan_model.cpp"
            flags = ("-std=c++17", "-O2", "-fPIC", "-shared")
            subprocess.run([compiler, *flags, *includes, source, "-o", library], check=True)
            self._library = ctypes.CDLL(library)
        self._library.num_constants.restype = ctypes.c_int64

    @staticmethod
    def cases(shape: Mla, plans: Iterable[Plan], num_sms: int) -> np.ndarray:
        """A row for each plan, as `estimate` takes them."""
        extents = (shape.batch, shape.s_q, shape.s_k, shape.heads, CACHED_TOKEN[shape.cache], num_sms)
        return np.array([(*extents, *plan) for plan in plans], dtype=np.int64)

    def constants(self) -> np.ndarray:
        """Those that the planner has, kernel by kernel."""
        constants = np.empty(self._library.num_constants())
        self._library.planner_constants(ctypes.c_void_p(constants.ctypes.data))
        return constants

    def estimate(self, cases: np.ndarray, constants: np.ndarray) -> np.ndarray:
        """Microseconds of each case."""
        times = np.empty(len(cases))
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in (cases, constants, times)]
        self._library.estimate(pointers[0], ctypes.c_int64(len(cases)), *pointers[1:])
        return times

    def choose(self, shape: Mla, num_sms: int) -> Plan:
        case = self.cases(shape, [(0, 0, 0)], num_sms)
        self._library.choose(ctypes.c_void_p(case.ctypes.data))
        size, parts, rows = case[0, -3:].tolist()
        return size, parts, rows


class Fit:
    """How well constants suit the times of sweeps, and better ones."""

    def __init__(self, model: Model, sweeps: Sequence[Results]) -> None:
        rows = [(name, row["us"], x["num_sms"]) for x in sweeps for name, row in x["shapes"].items()]
        times = [np.array([*us.values()]) for _, us, _ in rows]
        weights = np.concatenate([(x.min() / x) ** 2 for x in times])
        # A line for each shape, as long as the longest; what it has no plan for is at the end, where infinity is put.
        self.places = np.full((len(times), max(map(len, times))), -1)
        for line, x, start in zip(self.places, times, np.cumsum([0, *map(len, times)]), strict=False):
            line[: len(x)] = start + np.arange(len(x))
        self.model = model
        self.names = [name for name, *_ in rows]
        self.cases = np.concatenate([model.cases(shape_of(name), map(plan_of, us), sms) for name, us, sms in rows])
        self.times, self.weights = np.concatenate(times), weights / weights.sum()
        if np.isnan(model.estimate(self.cases, model.constants())).any():
            raise ValueError("a plan was timed whose kernel the planner does not know")

    def by_shape(self, times: np.ndarray) -> np.ndarray:
        return np.append(times, np.inf)[self.places]

    def regrets(self, constants: np.ndarray) -> np.ndarray:
        """Of the plans that a planner with these constants takes, for each shape."""
        estimates, times = map(self.by_shape, (self.model.estimate(self.cases, constants), self.times))
        chosen = np.take_along_axis(times, estimates.argmin(axis=1, keepdims=True), axis=1)
        return chosen[:, 0] / times.min(axis=1) - 1

    def expected_regrets(self, estimates: np.ndarray) -> np.ndarray:
        """Logarithms of one and what to expect if estimates are off by chance, about as far as NOISE."""
        estimates, times = map(self.by_shape, (estimates, self.times))
        chances = (estimates.min(axis=1, keepdims=True) / estimates) ** (1 / NOISE)
        slower = np.log(times / times.min(axis=1, keepdims=True), where=times < np.inf, out=np.zeros_like(times))
        return (chances * slower).sum(axis=1) / chances.sum(axis=1)

    def error(self, constants: np.ndarray) -> float:
        """Of an estimate, on average; of those of plans near the best above all."""
        return float(self.weights @ np.abs(np.log(self.model.estimate(self.cases, constants) / self.times)))

    def loss(self, constants: np.ndarray) -> float:
        """The expected regret beyond that of exact estimates: its mean, which is what counts, and some of the worst.

        And some of the error, which leads on where no choice changes.
        """
        estimates = self.model.estimate(self.cases, constants)
        if not np.isfinite(estimates).all():  # nothing comes from memory
            return math.inf
        expected = self.expected_regrets(estimates)
        excess = np.maximum(expected - self.expected_regrets(self.times), 0)
        return float(excess.mean() + 0.1 * excess.max()) + 0.1 * self.error(constants)

    def search(self, trials: int = 20_000) -> np.ndarray:
        """From the planner's constants on: a few at a time are changed by chance, by little or much; gains are kept.

        Many make up for each other, so one at a time gets stuck.
        """
        random = np.random.default_rng(0)
        best = self.model.constants()
        least = self.loss(best)
        for _ in range(trials):
            step = 0.3 * 10 ** -random.uniform(0, 2.5)
            is_changed = random.random(best.size) < 3 / best.size
            change = is_changed * step * random.standard_normal(best.size)
            tried = np.maximum(best + change * np.maximum(best, 0.1), 0)  # so that zero is no dead end
            loss = self.loss(tried)
            if loss < least:
                best, least = tried, loss
        return np.array([float(literal(x)) for x in best])

    def report(self, constants: np.ndarray) -> str:
        regrets = dict(zip(self.names, self.regrets(constants).tolist(), strict=True))
        return f"{summary(regrets)}; mean error {self.error(constants):.1%}"


def literal(x: float) -> str:
    """A constant as the planner's source has it: three digits, thousands and millions apart."""
    for exponent in (6, 3):
        if x >= 10**exponent:
            return f"{literal(x / 10**exponent)}e{exponent}"
    text = np.format_float_positional(round(x, 4), precision=3, unique=False, fractional=False, trim=".")
    return re.sub(r"^0(?=\.\d)", "", text)


def as_source(constants: np.ndarray) -> str:
    """The rows of kKernels with these constants; what else is in them stays."""
    rows = re.search(r"kKernels\[\] = \{\n(.*?)\n\};", PLANNER.read_text(), flags=re.S)
    assert rows is not None, f"no kKernels in {PLANNER}"
    texts = re.split(r"(?<![\w.])[\d.]+(?:e\d+)?", rows[1])  # what is between numbers
    return texts[0] + "".join(literal(x) + text for x, text in zip(constants, texts[1:], strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The time of every plan of MLA decoding, and constants that suit it.")
    parser.add_argument("shapes", metavar="SHAPE", type=shape_of, nargs="*", default=SHAPES, help="16x1x8192x128:fp8")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--seconds", type=float, default=480, help="begin no shape that would end after this time")
    parser.add_argument("--fit", type=Path, nargs="+", metavar="FILE", help="fit the constants to what sweeps wrote")
    options = parser.parse_args(argv)
    if options.fit:
        fit = Fit(Model(), [json.loads(path.read_text()) for path in options.fit])
        print("as it is:", fit.report(fit.model.constants()), flush=True)
        constants = fit.search()
        print("fitted:  ", fit.report(constants))
        print(as_source(constants))
        return 0
    if not GPU:
        print("sweep_mla_plans: no GPU here; --fit FILE needs none", file=sys.stderr)
        return 2
    sweep_all(options.shapes, options.seconds, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
