"""What README and docs say exists, runs and is measured."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("csrc", "deepseek_ops", "tests", "benchmarks", "docs", "tools", ".ci")
SOURCES = [
    *DOCUMENTS,
    *(path for folder in ("deepseek_ops", "tests", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")),
    *(path for path in (ROOT / "csrc").rglob("*.*") if path.is_file()),
]


def name_of(path):
    return str(path.relative_to(ROOT))


def prose(path):
    """The text without what stands in fenced blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)


def anchors(path):
    titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def sections(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{target} does not exist"
        assert found.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(found), f"{target}: no such heading"


ENDINGS = "cuh|cu|cpp|h|def|py|md|sh|json|txt"
FLOORS = "ptx|device|kernels|launch|torch|python"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_file_that_is_named_exists(path):
    if path == Path(__file__):
        return
    text = path.read_text()
    named = rf"(?<![\w/.-])((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*\w\.(?:{ENDINGS}))\b"
    for target in set(re.findall(named, text)):
        assert (ROOT / target).exists() or made_by_running(target), f"{target} does not exist"
    if path.is_relative_to(ROOT / "csrc"):
        for target in set(re.findall(rf"(?<![\w/<.-])((?:{FLOORS})/\w+\.(?:{ENDINGS}))\b", text)):
            assert (ROOT / "csrc" / target).exists(), f"{target} does not exist"


def made_by_running(target):
    """What `make gpu` writes: it is named before it is first there."""
    return target.startswith(("benchmarks/results/", "docs/figures/"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_make_target_exists(path):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert {"demo", "test"} <= targets
    for target in re.findall(r"^ *(?:`|    )?make ([a-z]+)\b", path.read_text(), flags=re.M):
        assert target in targets, f"make {target}"
    for target in re.findall(r"`make ([a-z]+)", path.read_text()):
        assert target in targets, f"make {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_snippets_run(path, tmp_path):
    for snippet in sections(path, "python"):
        done = subprocess.run(
            [sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, env=None, timeout=300
        )
        assert done.returncode == 0, done.stderr


def test_commands_of_the_readme_are_commands():
    from deepseek_ops.cli import _parser

    commands = re.findall(r"^deepseek-ops (.*)$", (ROOT / "README.md").read_text(), flags=re.M)
    assert commands
    for command in commands:
        _parser().parse_args(shlex.split(command))


def test_figures_are_those_of_the_results():
    subprocess.run([sys.executable, ROOT / "benchmarks/report.py", "--check"], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_speed_is_stated_between_markers_only(path):
    if path.name not in ("README.md", "architecture.md", "adding_an_op.md", "glossary.md"):
        return  # the kernels' own documents say what was tried, with dates
    outside = re.sub(r"<!-- figures:begin (\S+) -->.*?<!-- figures:end \1 -->", "", path.read_text(), flags=re.S)
    units = r"TFLOP|GFLOP|TB/s|GB/s|tokens/s|tok/s|[µu]s\b|ms\b|x faster|times faster|% faster|% of peak"
    claim = rf"\b\d[\d.,]*\s*(?:{units})"
    assert not re.findall(claim, outside)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200
