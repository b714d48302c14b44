"""Builds the native libraries with CMake and Ninja; CMakeLists.txt knows the sources, pyproject.toml all the rest.

Environment:
  DEEPSEEK_OPS_CUDA    auto (default: compile the kernels if nvcc is found), on, off
  DEEPSEEK_OPS_ARCHS   CUDA architectures, default 90a
  DEEPSEEK_OPS_JOBS    compile jobs at once, default the CPUs this process may use
  CUDACXX, CUDA_HOME   where nvcc is, if it is not on PATH or under /usr/local/cuda
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.build import build
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "deepseek_ops"
TORCH_MIN = (2, 11)


def find_nvcc():
    mode = os.environ.get("DEEPSEEK_OPS_CUDA", "auto")
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"DEEPSEEK_OPS_CUDA is auto, on or off, not {mode!r}")
    if mode == "off":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (
        os.environ.get("CUDACXX")
        or (home and shutil.which("nvcc", path=f"{home}/bin"))
        or shutil.which("nvcc")
        or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )
    if not nvcc and mode == "on":
        raise SystemExit("DEEPSEEK_OPS_CUDA=on, but no nvcc: set CUDACXX or CUDA_HOME")
    return nvcc


def find_torch():
    """The folder and version of the torch of this environment.

    torch is not imported: only its stable-ABI headers and libtorch_cpu.so are needed, and in pip's isolated build,
    which hides site-packages from imports, they can still be read from there.
    """
    spec = find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    for folder in candidates:
        header = folder / "include/torch/headeronly/version.h"
        if header.is_file():
            text = header.read_text()
            version = tuple(int(re.search(rf"TORCH_VERSION_{part} (\d+)", text)[1]) for part in ("MAJOR", "MINOR"))
            if version < TORCH_MIN:
                raise SystemExit(f"deepseek_ops needs torch {TORCH_MIN[0]}.{TORCH_MIN[1]} or newer; {folder} is older")
            return folder, version
    raise SystemExit(
        "deepseek_ops compiles against the torch installed in the same environment, and there is none: install "
        "torch first (pip install torch, or the wheel that fits your CUDA), then run this again; uv and "
        "python -m build, which build in an environment of their own, need --no-build-isolation"
    )


def nvcc_release(nvcc):
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else "unknown"


def find_tool(name):
    # beside this Python too: an environment that is used without being activated is not on PATH
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def say(text):
    print(f"deepseek_ops: {text}", file=sys.stderr, flush=True)


class early_dist_info(dist_info):
    def run(self):
        find_torch()  # pip asks for metadata first: say so before it downloads a torch, not after
        super().run()


class build_native(Command):
    description = "compile the kernels, the torch ops and the pybind11 module"
    user_options = []

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        nvcc = find_nvcc()
        torch_dir, torch_version = find_torch()
        tools = {tool: find_tool(tool) for tool in ("cmake", "ninja")}
        if not all(tools.values()):
            raise SystemExit("--no-build-isolation needs the build tools: pip install cmake ninja pybind11")
        has_pybind11 = find_spec("pybind11") is not None
        if not has_pybind11:
            say("no pybind11 found: building WITHOUT the NumPy/CuPy door; the torch ops do not need it")

        # one folder per Python, kept between builds: ninja then compiles only what changed
        temp = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        archs = os.environ.get("DEEPSEEK_OPS_ARCHS", "90a")
        config = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tools["ninja"],
            "DSO_CUDA": "ON" if nvcc else "OFF",
            "DSO_CUDA_ARCHS": archs,
            "DSO_PYTHON": "ON" if has_pybind11 else "OFF",
            "DSO_TORCH_DIR": torch_dir,
            "Python_EXECUTABLE": sys.executable,
        }
        if has_pybind11:
            config["pybind11_DIR"] = import_module("pybind11").get_cmake_dir()
        if nvcc:
            config["CMAKE_CUDA_COMPILER"] = nvcc
        jobs = os.environ.get("DEEPSEEK_OPS_JOBS") or str(len(os.sched_getaffinity(0)))
        say(f"torch {torch_version[0]}.{torch_version[1]} at {torch_dir}")
        say(f"CUDA kernels with {nvcc}" if nvcc else "no nvcc found: building WITHOUT CUDA kernels, CPU only")
        target = PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE.name
        # ccache, where there is one, then hits in every checkout of this source, CI's fresh clones too
        env = {"CCACHE_BASEDIR": str(ROOT), "CCACHE_NOHASHDIR": "1", **os.environ}

        def cmake(*args):
            code = subprocess.call([tools["cmake"], *map(str, args)], env=env)
            if code:
                hint = " (DEEPSEEK_OPS_CUDA=off builds without the CUDA kernels)" if nvcc else ""
                raise SystemExit(f"deepseek_ops: cmake failed with code {code}{hint}")

        cmake("-S", ROOT, "-B", temp, "-G", "Ninja", *(f"-D{key}={value}" for key, value in config.items()))
        cmake("--build", temp, "-j", jobs)
        cmake("--install", temp, "--prefix", target.resolve())
        info = {
            "version": self.distribution.get_version(),
            "cuda": bool(nvcc),
            "archs": archs.split(";") if nvcc else [],
            "nvcc": nvcc_release(nvcc) if nvcc else None,
            "torch_built": ".".join(map(str, torch_version)),
            "torch_min": ".".join(map(str, TORCH_MIN)),
        }
        (target / "_lib" / "build_info.json").write_text(json.dumps(info, indent=1) + "\n")

    def get_source_files(self):
        sources = [ROOT / "CMakeLists.txt", ROOT / "tools/strict_ptxas.sh", *sorted(ROOT.glob("csrc/**/*.*"))]
        return [str(path.relative_to(ROOT)) for path in sources]

    def get_outputs(self):
        base = PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE.name
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        names = ["_lib/libdeepseek_kernels.so", "_lib/libdeepseek_torch.so", "_lib/build_info.json", f"_native{suffix}"]
        return [str(base / name) for name in names if (base / name).exists()]

    def get_output_mapping(self):
        return {}


class NativeDistribution(Distribution):
    def has_ext_modules(self):  # a platform wheel, though no setuptools Extension is declared
        return True


build.sub_commands.append(("build_native", None))
setup(cmdclass={"build_native": build_native, "dist_info": early_dist_info}, distclass=NativeDistribution)
