"""The kernels under compute-sanitizer: memcheck, racecheck, synccheck and initcheck, each in a process of its own.

    python tests/sanitizer.py [--json FILE]      run all four; fails on a finding, or if a planted bug is missed
    python tests/sanitizer.py cases              what they run: every op that has a kernel, on small inputs
    python tests/sanitizer.py plant TOOL         a kernel with the bug that TOOL is for: it must be found

What no tool sees: TMA clamps accesses outside its tensor, and racecheck knows shared memory only. The suite's guard
bands and poisoned outputs are for these.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COMMON = ("--target-processes=application-only", "--destroy-on-device-error=context", "--print-limit=20")
TOOLS = {
    "memcheck": (
        "--check-api-memory-access=no",
        "--padding=512",
        "--track-stream-ordered-races=all",
        "--check-warpgroup-mma=yes",
    ),
    "racecheck": ("--racecheck-report=all",),
    "synccheck": (),
    "initcheck": ("--initcheck-address-space=all",),
}
"""Tool -> its own flags. A version that does not know one of them runs without."""

ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
"""Each tensor an allocation of its own, so that one cannot be overrun into another unseen."""

TIMEOUT = 240
"""Seconds for one process."""

PLANTED = {
    "memcheck": "x[n] = 1;",
    "racecheck": "__shared__ int s[64]; s[threadIdx.x] = n; x[threadIdx.x] = s[(threadIdx.x + 32) % 64];",
    "synccheck": "if (threadIdx.x % 32 < 16) __syncthreads(); x[threadIdx.x] = 1;",
    "initcheck": "x[threadIdx.x] += 1;",
}
"""Tool -> the body of a kernel `bug(int* x, int n)` of 64 threads over 64 uninitialised elements."""


# ------------------------------------------------------------------------------------ inside the checked process


def run_cases() -> int:
    """Runs every case on the GPU and returns how many there were."""
    import torch

    from deepseek_ops.registry import OPS
    from tests.samples import SAMPLES

    calls: list[tuple[Callable[..., Any], Callable[[str], tuple[Any, ...]]]]
    calls = [(OPS[op], SAMPLES[op]) for op in OPS if OPS[op].has_kernel]
    calls += [
        (decode_with_written_counters if op == "mla_decode" else OPS[op], make)
        for op, make in edge_cases()
        if OPS[op].has_kernel
    ]
    for run, make in calls:
        run(*make("cuda"))
        torch.cuda.synchronize()
    return len(calls)


def decode_with_written_counters(
    q: Any, kv_cache: Any, table: Any, lengths: Any, scale: float, causal: bool, offsets: Any, *options: Any
) -> None:
    """The op `mla_decode` by the C interface, where the workspace is the caller's.

    The counters there may hold anything at first, and initcheck reports that they are read before they are written. So
    here they hold garbage that was written. The rest of the workspace and the outputs are new: of these initcheck still
    finds what is read unwritten.
    """
    import torch

    from deepseek_ops.library import library_path
    from tests.emulator.interface import MlaDecodePlan, mla_decode_of

    d_v, batch_invariant, kv_scale = options
    out, lse = q.new_empty(*q.shape[:-1], d_v), q.new_empty(q.shape[:-1], dtype=torch.float32)
    operands = (q, kv_cache, table, lengths)
    decode = mla_decode_of(operands, out, lse, scale, causal, offsets, batch_invariant, kv_scale)
    plan = MlaDecodePlan()
    library = ctypes.CDLL(str(library_path("kernels")))
    assert library.dso_plan_mla_decode(ctypes.byref(decode), ctypes.byref(plan)) == 0
    # For each tile of rows its parts' sums and logarithms, and at the end of all the counters (launch/mla_decode.cu).
    counter_bytes = 8 * plan.cluster_size
    tile_bytes = 4 * plan.num_parts * plan.tile_rows * (d_v + plan.cluster_size) + counter_bytes
    workspace = q.new_empty(plan.workspace_bytes, dtype=torch.uint8)
    workspace[-(plan.workspace_bytes // tile_bytes) * counter_bytes :] = 0xA5
    decode.workspace = workspace.data_ptr()
    assert library.dso_mla_decode_by_plan(ctypes.byref(decode), ctypes.byref(plan), None) == 0


def edge_cases() -> list[tuple[str, Callable[[str], tuple[Any, ...]]]]:
    """Shapes at the edges of tiles, beside the tests' samples."""
    import torch

    import deepseek_ops
    from deepseek_ops.quantize import AMAX_FLOOR
    from tests.support import quantized_operands

    def k_groups(device: str) -> tuple[Any, ...]:
        """More steps than there are stages, and more rows than a tile has."""
        rows = [torch.randn(size, 1024, device=device).bfloat16() for size in (200, 136)]
        operands = [x for r in rows for x in deepseek_ops.per_token_cast_to_fp8(r, mn_major=True)]
        return *operands, torch.tensor([0, 128, 128, 1024], dtype=torch.int32, device=device), torch.bfloat16

    def pairs_of_a_cluster(device: str) -> tuple[Any, ...]:
        """So many that eight CTAs share them, and some that are other ranks' experts'."""
        return torch.randint(-1, 257, (4100, 8), dtype=torch.int32, device=device), 256, 8

    def decoding(device: str, dtype: torch.dtype, *, batch_invariant: bool) -> tuple[Any, ...]:
        """Ragged queries of 80 rows and fewer, over keys that clusters and parts share; a request has none."""
        b, max_pages, heads = 3, 34, 16
        kv_cache = torch.randn(b * max_pages, 64, 576, device=device).to(dtype)
        q = torch.randn(7, heads, 576, device=device).bfloat16()
        table = torch.randperm(b * max_pages, device=device).int().view(b, max_pages)
        lengths, offsets = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([2100, 0, 700], [0, 5, 6, 7]))
        kv_scale = 0.5 if dtype == torch.float8_e4m3fn else 1.0
        return q, kv_cache, table, lengths, 0.04, True, offsets, 512, batch_invariant, kv_scale

    def groups_of_any_size(device: str) -> tuple[Any, ...]:
        """More steps than there are stages, groups of more rows than a tile has, and rows that are nobody's."""
        a, b = torch.randn(160, 2056, device=device).bfloat16(), torch.randn(9, 264, 2056, device=device).bfloat16()
        return a, b, torch.tensor([2, 3, 3, 20, 29, 95, 95, 128, 150, 155], dtype=torch.int32, device=device)

    def mask(device: str, rows: int, n: int, counts: list[int], *options: Any) -> tuple[Any, ...]:
        x, w = (torch.randn(len(counts), extent, 272, device=device).bfloat16() for extent in (rows, n))
        operands = (*deepseek_ops.per_token_cast_to_fp8(x, mn_major=True), *deepseek_ops.per_block_cast_to_fp8(w))
        return *operands, torch.tensor(counts, dtype=torch.int32, device=device), *options

    def wide_tiles_of_a_mask(device: str) -> tuple[Any, ...]:
        """Groups that end low, of so much room that CTAs draw their tiles."""
        return mask(device, 2700, 264, [200, 0, 64], 192, torch.bfloat16)

    def halved_tiles_of_a_mask(device: str) -> tuple[Any, ...]:
        """192 tiles on the 132 SMs of an H200: the last 60 are halves. A group without rows is against the guess."""
        return mask(device, 40, 4096, [20, 32, 0, 1, 8, 9, 24], 16, torch.bfloat16, True)

    gemms = [(1, 2112, 512), (63, 136, 128), (65, 576, 384), (129, 264, 1040), (0, 128, 128)]
    tokens = [(1, 128), (5, 200), (65, 1152)]
    return [
        ("k_grouped_fp8_gemm_nt", k_groups),
        ("m_grouped_bf16_gemm_nt_offsets", groups_of_any_size),
        ("m_grouped_fp8_gemm_nt_masked", wide_tiles_of_a_mask),
        ("m_grouped_fp8_gemm_nt_masked", halved_tiles_of_a_mask),
        ("moe_mapping", pairs_of_a_cluster),
        *(
            ("mla_decode", lambda device, d=dtype, i=invariant: decoding(device, d, batch_invariant=i))
            for dtype in (torch.bfloat16, torch.float8_e4m3fn)
            for invariant in (False, True)
        ),
        *(
            ("fp8_gemm_nt", lambda device, s=shape: (*quantized_operands(*s, device), torch.bfloat16))
            for shape in gemms
        ),
        *(
            (
                "per_token_cast_to_fp8",
                lambda device, s=shape: (torch.randn(s, device=device).bfloat16(), False, True, AMAX_FLOOR),
            )
            for shape in tokens
        ),
    ]


def run_planted(tool: str) -> None:
    import cupy

    cupy.cuda.set_allocator(None)
    kernel = cupy.RawKernel(f'extern "C" __global__ void bug(int* x, int n) {{ {PLANTED[tool]} }}', "bug")
    x = cupy.ndarray(64, dtype=cupy.int32)  # uninitialised
    kernel((1,), (64,), (x, cupy.int32(64)))
    cupy.cuda.Device().synchronize()


# ----------------------------------------------------------------------------------------------------- outside

Run = Callable[[Sequence[str]], tuple[int, str]]
"""Runs a command: its exit code and what it printed."""


def run_command(command: Sequence[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
        )
    except subprocess.TimeoutExpired:
        return 124, f"no end after {TIMEOUT} s"
    return done.returncode, done.stdout


def num_findings(output: str) -> int | None:
    """What a tool's closing line counts, or None where there is none: it did not run to its end."""
    hazards = re.findall(r"RACECHECK SUMMARY: (\d+) hazard", output)
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", output)
    counts = hazards or errors
    return int(counts[-1]) if counts else None


def sanitize(tool: str, arguments: Sequence[str], run: Run) -> tuple[int | None, int, str]:
    """The findings of `tool` over this file with `arguments`, its exit code, and what it printed."""
    program = (sys.executable, str(Path(__file__).resolve()), *arguments)
    start = ("compute-sanitizer", f"--tool={tool}", *COMMON)
    code, output = run((*start, *TOOLS[tool], *program))
    if num_findings(output) is None and TOOLS[tool] and code != 124:
        code, output = run((*start, *program))
    return num_findings(output), code, output


def check(tool: str, run: Run = run_command) -> dict[str, Any]:
    """What `tool` finds in our kernels, and whether it finds the planted bug."""
    planted, _, planted_output = sanitize(tool, ("plant", tool), run)
    control = "not run" if planted is None else "found" if planted else "missed"
    findings, code, output = sanitize(tool, ("cases",), run)
    ran = re.search(r"(\d+) cases ran", output)
    num_cases = int(ran[1]) if ran else 0
    fine = findings == 0 and code == 0 and num_cases > 0 and control != "missed"
    status = "passed" if fine else "unavailable" if findings is None and planted is None else "failed"
    detail = "" if fine else tail(planted_output) if status == "unavailable" else first_finding(output)
    return {"status": status, "cases": num_cases, "findings": findings, "control": control, "detail": detail}


def tail(output: str, num_lines: int = 20) -> str:
    return "\n".join(output.strip().splitlines()[-num_lines:])


def first_finding(output: str, num_lines: int = 20) -> str:
    """The kernels that were found fault with, and the first finding; the end of the output where there is none."""
    lines = output.strip().splitlines()
    blamed = sorted({found for line in lines for found in re.findall(r"\bat (?:void )?(?:dso::)?(\w+_kernel)", line)})
    start = next(
        (i for i, line in enumerate(lines) if re.match(r"=+ (Error|Warning|Invalid|Uninitialized)", line)), None
    )
    if start is None:
        return tail(output, num_lines)
    return "\n".join([f"in {', '.join(blamed) or 'no kernel of ours'}:", *lines[start : start + num_lines]])


def check_all(run: Run = run_command) -> dict[str, dict[str, Any]]:
    if run is run_command and shutil.which("compute-sanitizer") is None:
        missing = {"status": "unavailable", "cases": 0, "findings": None, "control": "not run"}
        return dict.fromkeys(TOOLS, missing | {"detail": "no compute-sanitizer here"})
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        return dict(zip(TOOLS, pool.map(lambda tool: check(tool, run), TOOLS), strict=True))


def main(argv: Sequence[str] | None = None, run: Run = run_command) -> int:
    parser = argparse.ArgumentParser(description="The kernels under compute-sanitizer.")
    parser.add_argument("mode", nargs="?", choices=("all", "cases", "plant"), default="all")
    parser.add_argument("tool", nargs="?", choices=tuple(TOOLS))
    parser.add_argument("--json", type=Path, help="write the findings to this file")
    options = parser.parse_args(argv)
    if options.mode == "cases":
        print(f"{run_cases()} cases ran")
        return 0
    if options.mode == "plant":
        run_planted(options.tool)
        return 0
    found = check_all(run)
    for tool, x in found.items():
        print(f"{tool:10} {x['status']:12} {x['findings']} findings in {x['cases']} cases, planted bug {x['control']}")
        if x["detail"]:
            print(x["detail"])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(x["status"] == "failed" for x in found.values()))


if __name__ == "__main__":
    sys.exit(main())
