"""The time of every plan of the dense FP8 GEMM at chosen shapes: what the planner's constants are fitted to.

    python benchmarks/sweep_plans.py [--output FILE] [--constant] [m ...]

For each (n, k) of DeepSeek-V3's weights and each m given: plan (config, splits) -> microseconds, the planner's choice,
and DeepGEMM's time where --peers names a folder that has it.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import peers  # noqa: E402
from benchmarks.bench_gemm import operands  # noqa: E402
from benchmarks.shapes import Gemm  # noqa: E402
from deepseek_ops import _native, bench  # noqa: E402
from tests.support import num_left_tiles  # noqa: E402
from tests.test_gemm_plans import CONFIGS, num_sms, run_plan, sharing_workspace  # noqa: E402

WEIGHTS = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))


def plans(shape: Gemm, num_sms: int) -> list[tuple[int, ...]]:
    """Those that are not absurd: a plan of ten rounds of CTAs, or of more than twice the rows, need not be timed."""
    found: list[tuple[int, ...]] = []
    for config, tile in enumerate(CONFIGS):
        row_blocks = -(-shape.m // tile["block_m"])
        if (tile["block_m"] > 64 and tile["block_m"] >= 2 * shape.m) or row_blocks > (
            2 if tile["swaps_operands"] else 99
        ):
            continue
        for splits in (1, 2, 4, 8):
            ctas = row_blocks * -(-shape.n // tile["block_n"]) * splits
            if splits == 1 or (splits <= tile["most_splits"] and ctas <= 4 * num_sms and shape.k // 128 >= splits):
                found.append((config, splits))
        left_over = num_left_tiles(shape.m, shape.n, num_sms)
        if (tile["block_m"], tile["block_n"]) == (192, 128) and left_over * (shape.k // 128) >= num_sms:
            found.append((config, 1, left_over))
    return found


def sweep(shape: Gemm, constant: bool, with_peers: bool) -> dict[str, Any]:
    inputs = [operands(shape, seed) for seed in range(bench.num_input_sets(shape.num_bytes))]
    chosen = _native.fp8_gemm_plan(shape.m, shape.n, shape.k)
    workspace = sharing_workspace()  # one for all: to fill it takes as long as a small GEMM
    calls: dict[str, list[bench.Call]] = {}
    for plan in plans(shape, num_sms()):
        outs = [torch.empty(shape.m, shape.n, dtype=torch.bfloat16, device="cuda") for _ in inputs]
        pairs = zip(inputs, outs, strict=True)
        calls["/".join(map(str, plan))] = [
            partial(run_plan, plan, *x[:4], out, constant, workspace) for x, out in pairs
        ]
    if with_peers:
        calls["deep_gemm"] = [peers.dense_gemm()["deep_gemm"](*x) for x in inputs]
    measured = bench.measure(calls, replays=7, warm_up=0.05)
    times = {name: round(measured.median(name) * 1e6, 2) for name in measured.samples}
    plan = [chosen["config"], chosen["num_splits"], chosen["num_shared_tiles"]]
    return {"chosen": "/".join(map(str, plan if plan[-1] else plan[:-1])), "us": times, "absent": measured.absent}


def main() -> None:
    parser = argparse.ArgumentParser(description="The time of every plan.")
    parser.add_argument("m", type=int, nargs="*", default=[1, 16, 64, 128])
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--constant", action="store_true", help="as with b_is_constant=True")
    parser.add_argument("--peers", type=Path, help="folder with DeepGEMM")
    options = parser.parse_args()
    peers.folder = options.peers
    results: dict[str, Any] = {"conditions": bench.conditions("cuda"), "configs": CONFIGS, "shapes": {}}
    for m in options.m:
        for n, k in WEIGHTS:
            shape = Gemm(m, n, k)
            row = sweep(shape, options.constant, options.peers is not None)
            results["shapes"][str(shape)] = row
            best = sorted(row["us"].items(), key=lambda x: x[1])[:4]
            print(f"{shape}: chosen {row['chosen']} {row['us'].get(row['chosen'])}; best {best}", flush=True)
            if options.output:
                options.output.write_text(json.dumps(results, indent=1) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
