"""Builds the package's kernels and launchers, as they are, with g++ and the emulator in place of a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"

COMPILER = shutil.which("g++")
FOLDERS = [Path(nvcc).parent.parent / "include" for nvcc in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if nvcc]
CUDA_HEADERS = next((folder for folder in FOLDERS if (folder / "cuda_runtime.h").is_file()), None)
MISSING = "no g++" if COMPILER is None else "no CUDA headers" if CUDA_HEADERS is None else ""
"""What the emulator cannot be built without."""

FLAGS = [
    *("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-DDSO_WITH_CUDA"),
    "-fno-strict-aliasing",  # as nvcc compiles device code
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-sign-compare", "-Wno-psabi"),
    # The emulator's headers come before csrc's of the same names.
    *(f"-I{HERE}", f"-I{CSRC}", "-isystem", f"{CUDA_HEADERS}"),
]


def tiles_of(configs: str) -> list[tuple[str, tuple[int, ...]]]:
    """The lines of a list of compiled tiles in csrc/launch: which kernel, and its numbers."""
    lines = re.findall(r"^(DSO_\w+)\((.*)\)$", (CSRC / "launch" / configs).read_text(), flags=re.M)
    return [(kind, tuple(int(x) for x in numbers.split(","))) for kind, numbers in lines]


def fp8_gemm_tiles() -> list[tuple[str, tuple[int, ...]]]:
    return tiles_of("fp8_gemm_configs.def")


def tiles_for_groups() -> dict[int, str]:
    """Those whose warpgroups do not take steps in turn: place in the list -> its line."""
    tiles = fp8_gemm_tiles()
    return {i: f"{kind}{numbers}" for i, (kind, numbers) in enumerate(tiles) if numbers[2] == 1}


def bf16_gemm_tiles() -> list[tuple[int, ...]]:
    return [numbers for _, numbers in tiles_of("bf16_gemm_configs.def")]


def write_instances(folder: Path) -> list[Path]:
    """A source for each tile of the FP8 GEMM, as CMake writes them."""
    paths = []
    for kind, numbers in fp8_gemm_tiles():
        name = "_".join([kind.lower(), *map(str, numbers)])
        tile = f"{kind}({', '.join(map(str, numbers))})"
        paths.append(folder / f"{name}.cu")
        paths[-1].write_text(f'#include "launch/fp8_gemm_instance.cuh"\n{tile}\n')
    return paths


def compile_all(sources: list[Path], library: Path) -> None:
    """Compiles and links, two files at a time."""
    objects = [library.parent / f"{source.name}.o" for source in sources]

    def run(*arguments: object) -> None:
        done = subprocess.run([str(x) for x in (COMPILER, *arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def compile_one(source: Path, to: Path) -> None:
        run(*FLAGS, "-x", "c++", "-c", source, "-o", to)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    run("-shared", "-Wl,-z,defs", *objects, "-o", library)


def emulator_sources() -> list[Path]:
    return sorted(HERE.glob("*.cpp"))


def build_kernels(folder: Path) -> Path:
    """The library of the C interface in csrc/launch/deepseek_kernels.h, on the emulator."""
    launch = sorted(p for p in (CSRC / "launch").iterdir() if p.suffix in {".cu", ".cpp"})
    launch.sort(key=lambda path: path.name != "rms_norm.cu")  # the longest first
    library = folder / "libemulated_kernels.so"
    compile_all([*launch, *emulator_sources(), *write_instances(folder)], library)
    return library


def build_programs(folder: Path) -> Path:
    """The programs of programs.cu."""
    launch = [CSRC / "launch" / name for name in ("tensor_map.cu", "status.cpp")]
    library = folder / "libprograms.so"
    compile_all([HERE / "programs.cu", *launch, *emulator_sources()], library)
    return library
