"""The results file -> the tables in README.md and docs/, and the plots in docs/figures/.

    python benchmarks/report.py            rewrite what stands between the markers
    python benchmarks/report.py --check    fail if it differs from what the results give
    python benchmarks/report.py --plots    draw the plots, too (needs matplotlib)

A table stands between `<!-- figures:begin NAME -->` and `<!-- figures:end NAME -->`. NAME is `conditions`, `summary`,
`checks`, `host`, `generation`, `steps`, one of COMPARED or VARIANTS, or the name of an op.

An op that the results file lacks is shown from the one beside it whose name ends in "-before", a run of older sources,
and its table says so.

The results file (benchmarks/results/h200.json), schema 1; times are medians over `n` samples:

    schema      1
    conditions  date, device, driver_version, cuda, nvcc, torch, python, version, git_revision, git_dirty, csrc_sha256,
                power.limit, clocks.max.sm, clocks.max.mem, data
    ceilings    copy_gbps, read_gbps, fp8_tflops, bf16_tflops: measured in the same run. Where the cases are of several
                runs (of the same sources, on the same machine), these are the last one's, and each floor its own run's
    cases       a list of
        op, case      what ran at which shape
        flops, bytes  what a call computes, and the fewest bytes that it must move
        floor_us      max(flops / fp8_tflops (attention: bf16_tflops), bytes / max(copy_gbps, read_gbps))
        limit         the error that a correct result stays under
        a_a           [median, low, high] of our time over our own time: the noise
        date          of the run that measured it
        csrc_sha256   of the sources that it ran, if they are older than those of the conditions
        seconds       where the host's time went: inputs, prepare, measure, verify
        gpu_state     [least, median, largest] of clocks.sm, clocks.mem (MHz), power.draw (W) and temperature.gpu (C)
                      while the samples were taken, every bit of clocks_event_reasons.active, number of readings
        providers     provider ("deepseek_ops" is ours, VARIANTS are, too) -> either `absent`, the reason; or
            median_us, iqr_us, n, samples_us, timer ("cuda graph", "cuda events")
            tflops, gbps, share_of_floor (floor / median)
            ratio               [median, low, high] of its time over ours, paired, 95 %; not for ours
            error, correct      the worst row against float64 in the buffers that were timed; or `note`, why not
    missing     a list of op, case, why ("out of time", or how it failed): cases without figures
    host        a list of call, us: the host's cost of a call
    generation  a list of model, batch, tokens_per_second
    steps       decode steps of whole models (benchmarks/bench_decode_step.py), a list of
        model, batch, context   what ran, after how many tokens
        graph                   whether it was a CUDA graph
        step_us, floor_us       its time, and the sum of its ops' floors
        ops                     a list of op, calls, us, floor_us: of a step, the kernels launched one by one
    stages      stage of `make gpu` -> status ("passed", "failed", "timed out", "unavailable"), seconds, detail
    tests       passed, failed, errors, skipped
    sanitizer   tool -> status, cases, findings (null where it did not run), control ("found", "missed", "not run"):
                whether it saw a planted bug
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "h200.json"
COMPARED = {
    "variants": "h200-fp8-gemm-variants.json",
    "many_rows": "h200-fp8-gemm-many-rows.json",
    "loaders": "h200-fp8-gemm-loaders.json",
    "steps_in_turn": "h200-fp8-gemm-steps-in-turn.json",
    "tile_end": "h200-fp8-gemm-tile-end.json",
    "wide_tiles": "h200-fp8-gemm-wide-tiles.json",
    "masked_few_rows": "h200-masked-few-rows.json",
    "masked_many_rows": "h200-masked-many-rows.json",
}
"""Tables of designs that were compared once, each in a file of its own."""
OURS = "deepseek_ops"
VARIANTS = {
    "batch_invariant": ("fp8_gemm_nt", "batch_invariant=True"),
    "b_in_flight": ("fp8_gemm_nt", "b_is_constant=False"),
    "masked_in_flight": ("m_grouped_fp8_gemm_nt_masked_out", "b_is_constant=False"),
    "batch_invariant_decode": ("mla_decode", "batch_invariant=True"),
    "ragged_decode": ("mla_decode", "cu_seqlens_q"),
}
"""Our own ops called in another way, run beside the ordinary call: which op, and how. They are no peers."""
OUT_OF_TIME = "out of time"
NOT_MEASURED = "Not measured yet: `make gpu` on an H200 writes these figures."

Results = dict[str, Any]


# ------------------------------------------------------------------------------------------------- the tables


def conditions(results: Results) -> str:
    if "ceilings" not in results:
        return NOT_MEASURED
    c = results["conditions"]
    ceilings = results["ceilings"]
    dirty = " (with local changes)" if c.get("git_dirty") else ""
    revision = f"revision {c['git_revision'][:12]}{dirty}" if c.get("git_revision") else "no git revision at hand"
    ceiling = f"copy {ceilings['copy_gbps']:.0f} GB/s, read {ceilings['read_gbps']:.0f} GB/s"
    for key, what in (("fp8_tflops", "FP8 GEMM with one scale"), ("bf16_tflops", "bfloat16 GEMM")):
        ceiling += f", {what} {ceilings[key]:.0f} TFLOP/s" if ceilings.get(key) else ""
    dates = {case.get("date", c["date"]) for case in results["cases"] if "csrc_sha256" not in case}
    runs = f"\nThe cases come from {len(dates)} runs, the first of {min(dates)}." if len(dates) > 1 else ""
    return (
        f"{c['device']}, driver {c.get('driver_version', 'unknown')}, CUDA {c['cuda']}, torch {c['torch']}, "
        f"{revision}, csrc/ {c['csrc_sha256'][:12]}, {c['date']}. "
        f"Measured in the same run: {ceiling}.{runs}"
    )


def share_of_floor(results: Results, op: str) -> str | None:
    """The geometric mean over the cases of `op`; None where it was not measured."""
    shares = [case["providers"][OURS]["share_of_floor"] for case in results["cases"] if case["op"] == op]
    return f"{geometric_mean(shares):.0%}" if shares else None


def summary(results: Results) -> str:
    rows = []
    for op in dict.fromkeys(case["op"] for case in results["cases"]):
        cases = [case for case in results["cases"] if case["op"] == op]
        best = [ratio for case in cases if (ratio := best_peer(case)) is not None]
        slower = sum(verdict(case, ratio) == "slower" for case in cases if (ratio := best_peer(case)) is not None)
        rows.append(
            [
                f"`{op}`" + (f", {sources}" if (sources := older(cases)) else ""),
                len(cases),
                share_of_floor(results, op),
                f"{geometric_mean(r[0] for r in best):.2f}x" if best else "no peer ran",
                f"{slower} of {len(best)}" if best else "",
            ]
        )
    return markdown(["op", "cases", "share of floor", "best peer's time / ours", "cases slower than it"], rows)


def op_table(results: Results, op: str) -> str:
    cases = [case for case in results["cases"] if case["op"] == op]
    if not cases:
        return NOT_MEASURED
    ran = dict.fromkeys(p for case in cases for p, x in rivals(case).items() if "ratio" in x)
    header = ["case", "us", "IQR", "TFLOP/s", "GB/s", "of floor", *(f"{p} / ours" for p in ran), "A/A"]
    rows = []
    for case in cases:
        ours = case["providers"][OURS]
        rows.append(
            [
                case["case"],
                number(ours["median_us"]),
                number(ours["iqr_us"]),
                f"{ours['tflops']:.0f}" if case["flops"] else "",
                f"{ours['gbps']:.0f}",
                f"{ours['share_of_floor']:.0%}",
                *(ratio_cell(case, case["providers"].get(p, {})) for p in ran),
                f"{case['a_a'][0]:.3f}",
            ]
        )
    left = [x["case"] for x in results.get("missing", []) if x["op"] == op]
    notes = [f"Measured with {sources}."] if (sources := older(cases)) else []
    notes += [f"Not measured: {', '.join(left)}."] if left else []
    return "\n\n".join([markdown(header, rows), *notes])


def checks(results: Results) -> str:
    lines = []
    if tests := results.get("tests"):
        lines.append(", ".join(f"{count} {outcome}" for outcome, count in tests.items()) + " GPU tests.")
    sanitizer = results.get("sanitizer", {})
    rows = [
        [tool, x["status"], x["cases"], "" if x["findings"] is None else x["findings"], x["control"]]
        for tool, x in sanitizer.items()
    ]
    if rows:
        lines.append(markdown(["compute-sanitizer", "status", "cases", "findings", "planted bug"], rows))
    return "\n\n".join(lines) or NOT_MEASURED


def host(results: Results) -> str:
    rows = [[f"`{x['call']}`", number(x["us"])] for x in results["host"]]
    notes = [f"Measured with {sources}."] if (sources := older(results["host"])) else []
    return "\n\n".join([markdown(["call", "us"], rows), *notes]) if rows else NOT_MEASURED


def generation(results: Results) -> str:
    rows = [[x["model"], x["batch"], f"{x['tokens_per_second']:.0f}"] for x in results["generation"]]
    notes = [f"Measured with {sources}."] if (sources := older(results["generation"])) else []
    return "\n\n".join([markdown(["model", "batch", "tokens/s"], rows), *notes]) if rows else NOT_MEASURED


def steps(results: Results) -> str:
    """Decode steps, and below the ops of each."""
    found = results.get("steps", [])
    if not found:
        return NOT_MEASURED
    rows = [
        [x["model"], x["batch"], x["context"], number(x["step_us"]), number(x["floor_us"]), share(x["step_us"], x)]
        for x in found
    ]
    table = markdown(["model", "batch", "context", "us", "floor, us", "of floor"], rows)
    notes = [f"Measured with {sources}."] if (sources := older(found)) else []
    return "\n\n".join([table, *notes, *map(step_ops, found)])


def step_ops(step: dict[str, Any]) -> str:
    """A decode step by op: those that take a hundredth of it or more, the others as one."""
    total = sum(x["us"] for x in step["ops"])
    large = [x for x in step["ops"] if x["us"] >= total / 100]
    small = [x for x in step["ops"] if x["us"] < total / 100]
    rest = {"op": "", **{key: sum(x[key] for x in small) for key in ("calls", "us", "floor_us")}}
    rows = [
        [
            f"`{x['op']}`" if x["op"] else f"{len(small)} others",
            x["calls"],
            number(x["us"]),
            f"{x['us'] / total:.0%}" if total else "",
            number(x["floor_us"]),
            share(x["us"], x),
        ]
        for x in [*large, *([rest] if small else [])]
    ]
    times = f"kernels {number(total)} us, the step {number(step['step_us'])} us"
    title = f"{step['model']}, batch {step['batch']}: {times}."
    return f"{title}\n\n{markdown(['op', 'calls', 'us', 'of all', 'floor, us', 'of floor'], rows)}"


def share(microseconds: float, floor: dict[str, Any]) -> str:
    return f"{floor['floor_us'] / microseconds:.0%}" if microseconds else ""


def price(results: Results, variant: str) -> str:
    """What the variant's time is over the ordinary call's; nothing where it was not measured."""
    op, how = VARIANTS[variant]
    rows = [
        [
            case["case"],
            number(case["providers"][OURS]["median_us"]),
            number(x["median_us"]),
            "{:.2f} [{:.2f}, {:.2f}]".format(*x["ratio"]),
            f"{case['a_a'][0]:.3f}",
        ]
        for case in results["cases"]
        if case["op"] == op and "ratio" in (x := case["providers"].get(variant, {}))
    ]
    if not rows:
        return ""
    mean = geometric_mean(float(row[3].split()[0]) for row in rows)
    header = ["case", "us", f"`{how}`, us", "ratio", "A/A"]
    return f"With `{how}` a call takes {mean:.2f} times as long on average:\n\n{markdown(header, rows)}"


def compared(name: str) -> str:
    """Each variant's time over that of the first, which was kept."""
    runs = json.loads((ROOT / "benchmarks" / "results" / COMPARED[name]).read_text())
    kept, *others = runs["us"].items()
    rows = [[f"{kept[0]} (us)", *map(number, kept[1])]]
    for variant, times in others:
        rows.append([variant, *(f"{t / t_kept:.2f}x" for t, t_kept in zip(times, kept[1], strict=True))])
    return markdown(["", *runs["shapes"]], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "conditions": conditions,
    "summary": summary,
    "checks": checks,
    "host": host,
    "generation": generation,
    "steps": steps,
    **{name: lambda _, name=name: compared(name) for name in COMPARED},
    **{name: lambda results, name=name: price(results, name) for name in VARIANTS},
}


def table(name: str, results: Results | None) -> str:
    """What stands between the markers of `name`."""
    if results is None:
        return NOT_MEASURED
    return TABLES[name](results) if name in TABLES else op_table(results, name)


def rivals(case: dict[str, Any]) -> dict[str, Any]:
    """The providers that are not ours."""
    return {provider: x for provider, x in case["providers"].items() if provider not in (OURS, *VARIANTS)}


def best_peer(case: dict[str, Any]) -> list[float] | None:
    """The ratio to the fastest peer that ran and was right."""
    ratios = [x["ratio"] for x in rivals(case).values() if "ratio" in x and x.get("correct")]
    return min(ratios, default=None)


def verdict(case: dict[str, Any], ratio: Sequence[float]) -> str:
    """Faster or slower only where the interval lies clear of 1 by more than the noise of this case."""
    _, low, high = ratio
    _, noise_low, noise_high = case["a_a"]
    if low > max(1.0, noise_high):
        return "faster"
    return "slower" if high < min(1.0, noise_low) else "level"


def ratio_cell(case: dict[str, Any], provider: dict[str, Any]) -> str:
    if "ratio" not in provider:
        return ""
    median, low, high = provider["ratio"]
    cell = f"{median:.2f} [{low:.2f}, {high:.2f}]"
    if provider.get("correct") is False:
        return f"{cell} (its result is wrong)"
    return f"**{cell} slower**" if verdict(case, provider["ratio"]) == "slower" else cell


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(x) for x in values]
    return math.exp(sum(logs) / len(logs))


def number(x: float) -> str:
    return f"{x:.1f}" if x < 100 else f"{x:.0f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def short_table(results: Results) -> str:
    """What `make gpu` prints: a line for each case."""
    lines = [f"{'op':34} {'case':28} {'us':>9} {'of floor':>8}  best peer's time / ours"]
    for case in results["cases"]:
        ours, best = case["providers"][OURS], best_peer(case)
        peer = f"{best[0]:.2f} {verdict(case, best)}" if best else ""
        lines.append(
            f"{case['op']:34} {case['case']:28} {ours['median_us']:9.1f} {ours['share_of_floor']:8.0%}  {peer}".rstrip()
        )
    return "\n".join(lines)


def seconds_table(results: Results) -> str:
    """What the next run of each op's cases will take."""
    lines = []
    for op in dict.fromkeys(case["op"] for case in results["cases"]):
        spent = [case["seconds"] for case in results["cases"] if case["op"] == op and "seconds" in case]
        parts = {part: sum(x[part] for x in spent) for part in (spent[0] if spent else ())}
        shares = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
        lines.append(f"{op:34} {len(spent):3} cases {sum(parts.values()):7.1f} s: {shares}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ the documents

MARKERS = re.compile(
    r"(<!-- figures:begin (?P<name>\S+) -->\n)(?P<body>.*?)(<!-- figures:end (?P=name) -->)", re.DOTALL
)


def known_names() -> set[str]:
    from deepseek_ops.registry import OPS

    return {*TABLES, *OPS}


def render(text: str, results: Results | None) -> str:
    """`text` with every table between markers as the results give it."""
    begun = re.findall(r"<!-- figures:begin (\S+) -->", text)
    unknown = set(begun) - known_names()
    if unknown:
        raise ValueError(f"no figures of the name {', '.join(sorted(unknown))}")
    if len(begun) != len(MARKERS.findall(text)):
        raise ValueError("a figures:begin without its figures:end")
    return MARKERS.sub(lambda m: m[1] + (f"{body}\n" if (body := table(m["name"], results)) else "") + m[4], text)


def documents(root: Path) -> list[Path]:
    return [path for path in (root / "README.md", *sorted((root / "docs").glob("**/*.md"))) if path.is_file()]


def load(path: Path) -> Results | None:
    """The results, or None where nothing was measured yet."""
    if not path.is_file():
        return None
    results: Results = json.loads(path.read_text())
    if results.get("schema") != 1:
        raise ValueError(f"{path}: schema {results.get('schema')}, wanted 1")
    return results


def load_with_earlier(path: Path) -> Results | None:
    """The results, and of the run of older sources beside them the ops, host calls and decode steps that they lack."""
    results, before = load(path), load(path.with_stem(f"{path.stem}-before"))
    if results is None or before is None:
        return results
    measured = {case["op"] for case in results["cases"]}
    stamp = {"csrc_sha256": before["conditions"]["csrc_sha256"]}
    cases = [{**case, **stamp} for case in before["cases"] if case["op"] not in measured]
    missing = [case for case in before.get("missing", []) if case["op"] not in measured]
    return {
        **results,
        "cases": [*results["cases"], *cases],
        "missing": [*results.get("missing", []), *missing],
        **{
            kind: results.get(kind) or [{**row, **stamp} for row in before.get(kind, [])]
            for kind in ("host", "generation", "steps")
        },
    }


def older(rows: Iterable[dict[str, Any]]) -> str:
    """Which older sources were measured, or nothing."""
    hashes = {row["csrc_sha256"][:12] for row in rows if "csrc_sha256" in row}
    return f"older csrc/ {', '.join(sorted(hashes))}" if hashes else ""


def update(root: Path, results: Results | None, *, check: bool) -> list[Path]:
    """Rewrites the documents whose tables differ from the results (with `check`: only names them)."""
    stale = []
    for path in documents(root):
        text = path.read_text()
        wanted = render(text, results)
        if wanted != text:
            stale.append(path)
            if not check:
                path.write_text(wanted)
    return stale


# ---------------------------------------------------------------------------------------------------- the plots


def draw(results: Results, folder: Path) -> list[Path]:
    """A roofline of all cases, the GEMM over the number of tokens, and the latency of MLA decoding over the batch."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "figures"  # the same figures give the same file
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    plots = {"roofline": plot_roofline}
    if gemm_weights(results):
        plots |= {"fp8_gemm_floor": plot_gemm_floor, "fp8_gemm_peers": plot_gemm_peers}
    if any(case["op"] == "mla_decode" for case in results["cases"]):
        plots["mla_latency"] = plot_mla_latency
    drawn = []
    for name, plot in plots.items():
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        plot(axes, results)
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(fontsize=8)
        drawn.append(folder / f"{name}.svg")
        figure.savefig(drawn[-1], metadata={"Date": None})
        plt.close(figure)
    return drawn


def plot_roofline(axes: Any, results: Results) -> None:
    bandwidth = max(results["ceilings"]["copy_gbps"], results["ceilings"]["read_gbps"]) * 1e9
    peak = (results["ceilings"]["fp8_tflops"] or math.inf) * 1e12
    intensities = [2.0**i for i in range(-2, 14)]
    roof = [min(peak, bandwidth * i) / 1e12 for i in intensities]
    axes.loglog(intensities, roof, color="black", linewidth=1, label="measured ceilings")
    for op in dict.fromkeys(case["op"] for case in results["cases"] if case["flops"]):
        points = [
            (case["flops"] / case["bytes"], case["providers"][OURS]["tflops"])
            for case in results["cases"]
            if case["op"] == op
        ]
        axes.loglog(*zip(*points, strict=True), "o", markersize=4, label=op)
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(results["conditions"]["device"])


GEMM_CASE = re.compile(r"(?P<m>\d+) x (?P<weight>\d+ x \d+)")


def gemm_weights(results: Results) -> dict[str, dict[int, dict[str, Any]]]:
    """Dense GEMMs: weight -> tokens -> case, of the weights that were measured with three numbers of tokens or more."""
    weights: dict[str, dict[int, dict[str, Any]]] = {}
    for case in results["cases"]:
        if case["op"] == "fp8_gemm_nt" and (found := GEMM_CASE.fullmatch(case["case"])):
            weights.setdefault(found["weight"], {})[int(found["m"])] = case
    return {weight: dict(sorted(cases.items())) for weight, cases in weights.items() if len(cases) > 2}


def plot_gemm_floor(axes: Any, results: Results) -> None:
    for weight, cases in gemm_weights(results).items():
        shares = [100 * case["providers"][OURS]["share_of_floor"] for case in cases.values()]
        axes.semilogx([*cases], shares, "o-", base=2, markersize=4, label=f"n x k = {weight}")
    axes.set_ylim(0, 105)
    axes.set_xlabel("m, tokens")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylabel("% of the floor")
    axes.set_title("Dense FP8 GEMM, share of the floor")


def plot_gemm_peers(axes: Any, results: Results) -> None:
    """Of each peer's times over ours, the mean over the weights and the range between them."""
    ratios: dict[str, dict[int, list[float]]] = {}
    for cases in gemm_weights(results).values():
        for m, case in cases.items():
            for peer, x in rivals(case).items():
                if "ratio" in x and x.get("correct"):
                    ratios.setdefault(peer, {}).setdefault(m, []).append(x["ratio"][0])
    for peer, of_tokens in sorted(ratios.items()):
        tokens = sorted(of_tokens)
        [line] = axes.semilogx(
            tokens, [geometric_mean(of_tokens[m]) for m in tokens], "o-", base=2, markersize=4, label=peer
        )
        lows, highs = ([of(of_tokens[m]) for m in tokens] for of in (min, max))
        axes.fill_between(tokens, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axhline(1, color="black", linewidth=1)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("m, tokens")
    axes.set_ylabel("its time / ours: above 1 we are faster")
    axes.set_title("Dense FP8 GEMM beside its peers: mean and range over the weights")


MLA_CASE = re.compile(r"(?P<batch>\d+) x 1 x (?P<s_k>\d+), 16 heads, bf16")


def plot_mla_latency(axes: Any, results: Results) -> None:
    curves: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for case in results["cases"]:
        if case["op"] == "mla_decode" and (found := MLA_CASE.fullmatch(case["case"])):
            for provider, x in case["providers"].items():
                if "median_us" in x:
                    curves.setdefault((provider, int(found["s_k"])), []).append((int(found["batch"]), x["median_us"]))
    for (provider, s_k), points in sorted(curves.items()):
        style = "o-" if provider == OURS else "x--"
        axes.loglog(*zip(*sorted(points), strict=True), style, markersize=4, label=f"{provider}, {s_k} tokens")
    axes.set_xlabel("batch")
    axes.set_ylabel("us")
    axes.set_title("MLA decoding, 16 heads, bfloat16 cache")


# ----------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description="Results -> tables and plots.")
    parser.add_argument("--results", type=Path, default=root / RESULTS.relative_to(ROOT))
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a document is stale")
    parser.add_argument("--plots", action="store_true", help="draw docs/figures/*.svg, too")
    options = parser.parse_args(argv)
    results = load_with_earlier(options.results)
    stale = update(root, results, check=options.check)
    for path in stale:
        print(f"{path.relative_to(root)}: {'differs from the results' if options.check else 'rewritten'}")
    if options.plots and results is not None:
        for path in draw(results, root / "docs" / "figures"):
            print(f"{path.relative_to(root)}: drawn")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
