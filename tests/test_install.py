"""Building and installing: what is packed, what is said when something is missing, and that nothing is downloaded.

The builds here are of a copy of the sources and without the CUDA kernels, which would take minutes; the suite itself
runs on a full build.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["CMakeLists.txt", "LICENSE", "README.md", "csrc", "deepseek_ops", "pyproject.toml", "setup.py", "tools"]
NOT_SOURCES = shutil.ignore_patterns("_lib", "_native*.so", "__pycache__")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source folder"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]


def can_unshare():
    """Whether a process without a network can be had."""
    command = ["unshare", "--net", "--map-root-user", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


OFFLINE = ["unshare", "--net", "--map-root-user"] if can_unshare() else []


def run(*command, cwd, env=None, check=True):
    env = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0 or not check, done.stdout
    return done


def copy_sources(folder):
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=NOT_SOURCES)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def build_wheel(sources, env=None):
    """The wheel built from `sources` without CUDA and without a network, and what the build said."""
    code = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    wheels = sources / "wheels"
    wheels.mkdir()
    env = {"DEEPSEEK_OPS_CUDA": "off", **(env or {})}
    said = run(*OFFLINE, sys.executable, "-c", code, wheels, cwd=sources, env=env).stdout
    (wheel,) = wheels.glob("*.whl")
    return wheel, said


def unpack(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def in_site(site, code, cwd):
    """Runs `code` in a fresh Python that imports the package from `site`."""
    return run(sys.executable, "-c", code, cwd=cwd, env={"PYTHONPATH": str(site)}).stdout.strip()


@pytest.fixture(scope="module")
def cpu_wheel(tmp_path_factory):
    return build_wheel(copy_sources(tmp_path_factory.mktemp("cpu") / "sources"))


def test_wheel_holds_package_and_libraries(cpu_wheel):
    wheel, _ = cpu_wheel
    names = zipfile.ZipFile(wheel).namelist()
    modules = [str(p.relative_to(ROOT)) for p in (ROOT / "deepseek_ops").rglob("*.py")]
    libraries = [f"deepseek_ops/_lib/{name}" for name in ("libdeepseek_kernels.so", "libdeepseek_torch.so")]
    assert {*modules, *libraries, "deepseek_ops/_lib/build_info.json", "deepseek_ops/py.typed"} <= set(names)
    packed = [name for name in names if ".dist-info/" not in name]
    assert all(name.startswith("deepseek_ops/") for name in packed), "nothing else is packed"
    assert any("LICENSE" in name for name in names)
    assert sysconfig.get_platform().split("-")[0] in wheel.name, "the wheel is one platform's"


def test_build_without_cuda_says_so_and_its_ops_run(cpu_wheel, tmp_path):
    wheel, said = cpu_wheel
    assert "deepseek_ops: no nvcc found: building WITHOUT CUDA kernels, CPU only" in said
    site = unpack(wheel, tmp_path / "site")
    code = """
import json, torch, deepseek_ops
a, sfa = deepseek_ops.per_token_cast_to_fp8(torch.randn(5, 256))
b, sfb = deepseek_ops.per_block_cast_to_fp8(torch.randn(64, 256))
assert deepseek_ops.fp8_gemm_nt(a, sfa, b, sfb).isfinite().all()
print(json.dumps([deepseek_ops.__file__, deepseek_ops.build_info["cuda"]]))
"""
    file, cuda = json.loads(in_site(site, code, tmp_path))
    assert Path(file).is_relative_to(site)
    assert cuda is False


def test_sources_packed_and_unpacked_build_again(tmp_path):
    sources = copy_sources(tmp_path / "sources")
    code = "from setuptools import build_meta; build_meta.build_sdist('.')"
    run(*OFFLINE, sys.executable, "-c", code, cwd=sources)
    (packed,) = sources.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        names = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    native = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*")]
    assert {*native, "CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert "tools/strict_ptxas.sh" in names, "CMake needs it"
    assert not [name for name in names if name.endswith((".so", ".o"))]


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python that has setuptools and nothing else: no torch, no pip."""
    folder = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    site = folder / "site"
    site.mkdir()
    installed = Path(pytest.importorskip("setuptools").__file__).parent.parent
    for pattern in ("setuptools*", "_distutils_hack"):  # the metadata has the commands' names
        for path in installed.glob(pattern):
            (site / path.name).symlink_to(path)
    return folder / "venv/bin/python", {"PYTHONPATH": str(site)}


def test_missing_torch_is_said_in_one_sentence_before_anything_is_built(bare_python, tmp_path):
    python, env = bare_python
    sources = copy_sources(tmp_path / "sources")
    for command in ("dist_info", "build_native"):
        failed = run(python, "setup.py", "-q", command, cwd=sources, env=env, check=False)
        assert failed.returncode != 0
        last = failed.stdout.strip().splitlines()[-1]
        assert "compiles against the torch installed in the same environment, and there is none" in last
        assert "Traceback" not in failed.stdout
    assert not (sources / "build").exists()


SETUP = """
import sys
import setuptools
setuptools.setup = lambda **keywords: None
sys.argv = ["setup.py"]
names = {"__file__": "setup.py", "__name__": "deepseek_setup"}
exec(compile(open("setup.py").read(), "setup.py", "exec"), names)
names["shutil"].which = lambda name, path=None: None
"""
"""Loads setup.py's functions on a machine that seems to have no program at all."""


def test_cuda_demanded_without_nvcc_stops_in_one_sentence():
    env = {"DEEPSEEK_OPS_CUDA": "on", "CUDACXX": None, "CUDA_HOME": None, "CUDA_PATH": None}
    failed = run(sys.executable, "-c", SETUP + "names['find_nvcc']()", cwd=ROOT, env=env, check=False)
    assert failed.returncode != 0
    assert failed.stdout.strip() == "DEEPSEEK_OPS_CUDA=on, but no nvcc: set CUDACXX or CUDA_HOME"


def test_cuda_if_available_without_nvcc_is_off():
    env = {"DEEPSEEK_OPS_CUDA": "auto", "CUDACXX": None, "CUDA_HOME": None, "CUDA_PATH": None}
    found = run(sys.executable, "-c", SETUP + "print(names['find_nvcc']())", cwd=ROOT, env=env)
    assert found.stdout.strip() == "None"


def test_misspelt_cuda_setting_is_refused():
    failed = run(
        *(sys.executable, "-c", SETUP + "names['find_nvcc']()"), cwd=ROOT, env={"DEEPSEEK_OPS_CUDA": "yes"}, check=False
    )
    assert failed.stdout.strip() == "DEEPSEEK_OPS_CUDA is auto, on or off, not 'yes'"


def test_missing_build_tools_are_named(tmp_path):
    code = (
        SETUP
        + """
names["find_torch"] = lambda: (None, (2, 11))
command = names["build_native"](setuptools.Distribution())
command.run()
"""
    )
    failed = run(sys.executable, "-c", code, cwd=ROOT, env={"DEEPSEEK_OPS_CUDA": "off"}, check=False)
    assert failed.returncode != 0
    assert failed.stdout.strip() == "--no-build-isolation needs the build tools: pip install cmake ninja pybind11"


def test_errors_arrive_typed_where_the_compiler_links_its_own_cxx_runtime(tmp_path):
    # Some toolchains link libstdc++ statically; an exception must still cross from the ops into torch, and be caught.
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("c++")} "$@" -static-libstdc++\n')
    compiler.chmod(0o755)
    wheel, _ = build_wheel(copy_sources(tmp_path / "sources"), env={"CXX": str(compiler)})
    site = unpack(wheel, tmp_path / "site")
    code = """
import torch, deepseek_ops
x = torch.randn(5, 256)
a, sfa = deepseek_ops.per_token_cast_to_fp8(x)
b, sfb = deepseek_ops.per_block_cast_to_fp8(torch.randn(64, 256))
for error, call in [
    (TypeError, lambda: deepseek_ops.fp8_gemm_nt(x, sfa, b, sfb)),
    (ValueError, lambda: deepseek_ops.fp8_gemm_nt(a, sfa[1:], b, sfb)),
    (ValueError, lambda: deepseek_ops.per_token_cast_to_fp8(x[0])),
    (RuntimeError, lambda: torch.ops.deepseek_ops.fp8_gemm_nt(a, sfa)),
]:
    try:
        call()
    except error:
        continue
    raise SystemExit(f"no {error.__name__}")
assert deepseek_ops.fp8_gemm_nt(a, sfa, b, sfb).isfinite().all()
from deepseek_ops import _native
for name in dir(_native):
    if callable(getattr(_native, name)) and not name.startswith("__"):
        try:
            getattr(_native, name)(*[None] * 20)
        except Exception:
            continue
        raise SystemExit(f"{name} takes anything")
print("alive")
"""
    assert in_site(site, code, tmp_path).splitlines()[-1] == "alive"


@pytest.mark.parametrize(
    ("requirement", "missing"),
    [
        ("pytest", False),
        ("pytest>=1", False),
        ("pytest>=1000", True),
        ("no-such-thing", True),
        ("no-such-thing>=1", True),
    ],
)
def test_what_is_not_there_or_too_old_is_missing(requirement, missing):
    install = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
    module = importlib.util.module_from_spec(install)
    install.loader.exec_module(module)
    assert module.is_missing(requirement) == missing
