"""The floors of the tree: includes and imports point down only, and what does not belong on a floor is not there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "deepseek_ops"

FLOORS = {"ptx": 0, "device": 1, "kernels": 2, "launch": 3, "torch": 4, "python": 4}
"""The floors of csrc/ from the hardware up. torch/ and python/ stand side by side."""

FRONT_DOORS = {"__main__", "cli"}
"""Modules beside the ops that may use the model: the commands."""

MEASURING = {"bench", "op_table"}
"""Modules that no op, no model and no import of the package loads: they time ops, and ask nvidia-smi for conditions."""

ENVIRONMENT: dict[str, set[str]] = {}
"""Module -> the environment variables it may read at run time. None: the same call always does the same."""

SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cuh", ".cu", ".cpp", ".def"})
MODULES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts).replace(".__init__", ""): p
    for p in sorted(PACKAGE.rglob("*.py"))
}


def name_of(path):
    return str(path.relative_to(ROOT))


def code_of(path):
    """C++ source without comments and string literals."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
    keep_includes = re.sub(r'(#\s*include\s*)"([^"]*)"', r"\1<\2>", path.read_text())
    return re.sub(pattern, '""', keep_includes, flags=re.S)


def includes_of(path):
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), flags=re.M)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_includes_point_down(path):
    own = path.relative_to(CSRC).parts[0]
    for quote, target in includes_of(path):
        floor = target.split("/")[0]
        if quote == '"':
            assert (CSRC / target).is_file(), f"{target}: our own headers are named from csrc/, and exist"
            assert floor == own or FLOORS[floor] < FLOORS[own], f"{own}/ must not include {target}"
        else:
            assert not (CSRC / target).exists(), f"<{target}>: our own headers stand in quotes"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_each_library_is_known_on_one_floor_only(path):
    own = path.relative_to(CSRC).parts[0]
    for _, target in includes_of(path):
        top = target.split("/")[0]
        assert top not in ("ATen", "c10", "cutlass", "cute"), f"{target}: no unstable torch, no CUTLASS"
        assert top != "torch" or own == "torch" or (CSRC / target).is_file(), (
            f"{target}: torch is known in csrc/torch only"
        )
        assert top not in ("pybind11", "Python.h") or own == "python", f"{target}: Python is known in csrc/python only"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_native_code_neither_prints_nor_ends_the_process(path):
    streams = {"iostream", "ostream", "istream", "sstream", "fstream", "iomanip"}
    # A message formatted with streams crashes where the compiler links libstdc++ statically beside torch's.
    assert not streams & {target for _, target in includes_of(path)}, "no C++ streams: format with snprintf"
    banned = (
        r"(?<![\w.>])(?:std::)?(exit|_exit|quick_exit|abort|terminate|printf|puts|putchar|system|popen|getenv)\s*\("
    )
    assert not re.findall(banned, code_of(path))
    assert not re.findall(r"\b(fprintf|assert)\s*\(|\b(stdout|stderr)\b", code_of(path))


@pytest.mark.parametrize("path", [p for p in SOURCES if p.suffix in {".h", ".cpp"}], ids=name_of)
def test_host_files_have_no_device_code(path):
    assert not re.findall(r"__global__|__device__|__shared__|<<<|\basm\b", code_of(path))


def test_every_kernel_states_its_contract():
    kernels = sorted((CSRC / "kernels").glob("*.cuh"))
    for path in kernels:
        opening = path.read_text().split("#pragma once")[0] or path.read_text()[:2000]
        assert opening.count("//") >= 5, f"{name_of(path)} must open with its contract"


# ------------------------------------------------------------------------------------------------- Python


def imports_of(name, only_top_level=False):
    """The package's modules that `name` imports, each with the names taken from it (None: the module itself)."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part != "__init__"]
    tree = ast.parse(path.read_text())
    nodes = tree.body if only_top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            targets = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["deepseek_ops", *package][: len(package) + 2 - node.level] if node.level else []
            module = ".".join(filter(None, [*base, node.module or ""]))
            targets = [(module, alias.name) for alias in node.names]
        else:
            continue
        for module, taken in targets:
            if module.split(".")[0] != "deepseek_ops":
                continue
            inner = module.removeprefix("deepseek_ops").lstrip(".") or "__init__"
            submodule = f"{inner}.{taken}" if inner != "__init__" else taken
            yield (submodule, None) if submodule in MODULES else (inner, taken)


def test_ops_do_not_know_the_model():
    for name in MODULES:
        if not name.startswith("model") and name not in FRONT_DOORS:
            for target, _ in imports_of(name):
                assert not target.startswith("model"), f"deepseek_ops/{name} imports {target}"


def test_nothing_but_the_commands_loads_what_measures():
    for name in MODULES:
        if name not in FRONT_DOORS | MEASURING:
            assert not MEASURING & {target for target, _ in imports_of(name)}, name


def test_the_model_uses_what_is_public():
    for name in MODULES:
        if name.startswith("model"):
            for target, taken in imports_of(name):
                assert not any(part.startswith("_") and part != "__init__" for part in target.split(".")), target
                assert taken is None or not taken.startswith("_"), f"{name} takes {taken} from {target}"


def test_imports_make_no_cycle():
    graph = {name: {target for target, _ in imports_of(name, only_top_level=True)} - {name} for name in MODULES}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"import cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done or name not in graph:
            return
        path.append(name)
        for target in sorted(graph[name]):
            visit(target)
        done.add(path.pop())

    for name in graph:
        visit(name)


@pytest.mark.parametrize("name", MODULES)
def test_python_starts_nothing_unpickles_nothing_and_checks_without_assert(name):
    tree = ast.parse(MODULES[name].read_text())
    banned = {"multiprocessing", "socket", "urllib", "requests", "pickle", "shelve", "marshal", "dill"}
    banned |= set() if name in MEASURING else {"subprocess"}
    for node in ast.walk(tree):
        # `python -O` removes assertions, so none may guard an input; one that tells the type checker a type may stay.
        if isinstance(node, ast.Assert) and name not in MEASURING:
            tells_type = ast.unparse(node.test).endswith("is not None") or ast.unparse(node.test).startswith(
                "isinstance("
            )
            assert tells_type, f"line {node.lineno}: raise an exception instead of asserting"
        if isinstance(node, ast.Import):
            assert not banned & {alias.name.split(".")[0] for alias in node.names}, f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in banned, f"line {node.lineno}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "torch.load", "os.system", "os.popen"}, (
                f"line {node.lineno}: {called}"
            )


@pytest.mark.parametrize("name", MODULES)
def test_no_environment_variable_changes_what_a_call_does(name):
    reads = re.findall(r"(?:os\.environ|os\.getenv|getenv)\W+(\w+)", MODULES[name].read_text())
    assert set(reads) <= ENVIRONMENT.get(name, set())
