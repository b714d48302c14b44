"""The time of every compiled tile of the grouped bfloat16 GEMM, at V2-Lite's decode steps: which of them to keep.

    python benchmarks/sweep_bf16_tiles.py [--output FILE]

For each shape of LITE_EXPERTS: tile -> microseconds, beside the op as it is and torch's `grouped_mm`.
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
from benchmarks.bench_grouped_gemm import bf16_operands  # noqa: E402
from benchmarks.shapes import LITE_EXPERTS, ChosenExperts  # noqa: E402
from deepseek_ops import bench, m_grouped_bf16_gemm_nt_offsets  # noqa: E402
from tests.test_grouped_bf16_gemm_tiles import TILES, run_tile  # noqa: E402


def sweep(shape: ChosenExperts) -> dict[str, Any]:
    inputs = [bf16_operands(shape, seed) for seed in range(bench.num_input_sets(shape.num_bytes))]
    calls: dict[str, list[bench.Call]] = {"the op": [partial(m_grouped_bf16_gemm_nt_offsets, *x) for x in inputs]}
    for config, tile in enumerate(TILES):
        outs = [torch.empty(shape.rows, shape.n, dtype=torch.bfloat16, device="cuda") for _ in inputs]
        calls[" x ".join(map(str, tile))] = [
            partial(run_tile, config, *x, out) for x, out in zip(inputs, outs, strict=True)
        ]
    calls |= {name: [prepare(*x) for x in inputs] for name, prepare in peers.offsets_bf16_gemm().items()}
    measured = bench.measure(calls, replays=7, warm_up=0.05)
    return {"us": {name: round(measured.median(name) * 1e6, 2) for name in measured.samples}, "absent": measured.absent}


def main() -> None:
    parser = argparse.ArgumentParser(description="The time of every tile.")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    results: dict[str, Any] = {"conditions": bench.conditions("cuda"), "shapes": {}}
    for shape in LITE_EXPERTS:
        row = sweep(shape)
        results["shapes"][str(shape)] = row
        floor = shape.num_bytes / 4.3e6
        print(f"{shape}: {floor:.1f} us at 4.3 TB/s; {sorted(row['us'].items(), key=lambda x: x[1])}", flush=True)
        if options.output:
            options.output.write_text(json.dumps(results, indent=1) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
