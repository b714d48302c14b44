"""The README's table of ops, written from what is in the tree: one row per op, each with its links.

python tools/op_index.py            rewrite the table between its markers
python tools/op_index.py --check    fail if it is not what the tree gives
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402

README = ROOT / "README.md"
MARKERS = re.compile(r"(<!-- ops:begin -->\n).*?(<!-- ops:end -->)", re.DOTALL)


def kernels() -> set[str]:
    """The ops that csrc/torch/register.cpp gives a CUDA kernel."""
    registered = r"^ *DSO_REGISTER(?:_WHERE)?\(library, (\w+)[,)]"
    return set(re.findall(registered, (ROOT / "csrc/torch/register.cpp").read_text(), re.M))


def module_of(op: str) -> str:
    """The module of deepseek_ops that promises `op`."""
    name: str = getattr(importlib.import_module("deepseek_ops"), op).__module__
    return name.removeprefix("deepseek_ops.")


def kernel_of(op: str) -> Path | None:
    """The file of the op's kernel: that of its name, else the one that its module names; None where there is none."""
    if op not in kernels():
        return None
    stem = op.removesuffix("_out").removesuffix("_nt")
    for own in (Path(f"csrc/kernels/{stem}.cuh"), Path(f"csrc/kernels/sm90_{stem}.cuh")):
        if (ROOT / own).is_file():
            return own
    docstring = importlib.import_module(f"deepseek_ops.{module_of(op)}").__doc__ or ""
    found = re.search(r"Kernel: (csrc/kernels/\S+\.cuh)", docstring)
    if found is None:
        raise LookupError(f"{op} has a kernel, but deepseek_ops/{module_of(op)}.py does not say in which file")
    return Path(found[1])


def test_of(op: str) -> Path:
    """The test file that is the op's own: tests/test_<module>.py."""
    return Path(f"tests/test_{module_of(op)}.py")


def bench_of(op: str) -> Path | None:
    """The bench that measures the op; what writes into `out` is measured with the op that allocates it."""
    op, module = op.removesuffix("_out"), module_of(op)
    # Benches name the op that they measure in quotes, in full or with its last word filled in.
    named = re.compile(rf'"{op}(_out)?"|f"{op.rpartition("_")[0] or op}_\{{')
    benches = sorted((ROOT / "benchmarks").glob("bench_*.py"), key=lambda path: (path.stem != f"bench_{module}", path))
    found = [path.relative_to(ROOT) for path in benches if named.search(path.read_text())]
    return found[0] if found else None


def figure_of(op: str) -> str:
    """The op's share of its floor over all measured cases, with a link to the table of them where a document has it."""
    op = op.removesuffix("_out")
    results = report.load_with_earlier(report.RESULTS)
    share = None if results is None else report.share_of_floor(results, op)
    if share is None:
        return "–"
    documents = [path for path in sorted((ROOT / "docs").glob("*.md")) if f"figures:begin {op} " in path.read_text()]
    return f"[{share} of floor]({documents[0].relative_to(ROOT)}#figures)" if documents else f"{share} of floor"


def summary_of(op: str) -> str:
    """The first paragraph of the op's docstring."""
    text = getattr(importlib.import_module("deepseek_ops"), op).__doc__
    return " ".join(text.strip().split("\n\n")[0].split()).replace("|", "\\|")


def link(path: Path | None, text: str = "") -> str:
    return f"[{text or path.name}]({path})" if path else "–"


def table() -> str:
    from deepseek_ops.registry import OPS

    header = ["op", "computes", "CUDA kernel", "test", "bench", "figure"]
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
    for op in OPS:
        promised = Path(f"deepseek_ops/{module_of(op)}.py")
        links = [link(kernel_of(op)), link(test_of(op)), link(bench_of(op))]
        cells = [link(promised, f"`{op}`"), summary_of(op), *links, figure_of(op)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    text = README.read_text()
    wanted = MARKERS.sub(lambda markers: markers[1] + table() + markers[2], text)
    if wanted == text:
        return
    if "--check" in sys.argv[1:]:
        raise SystemExit("README.md: the table of ops is out of date: run python tools/op_index.py")
    README.write_text(wanted)


if __name__ == "__main__":
    main()
