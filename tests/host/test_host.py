"""Host programs: planners, tile schedulers, divisions and the pipeline's protocol, enumerated without a GPU.

Each program includes the very headers that the kernels are made of, is compiled with overflow as an error, and ends
with a line that says how many cases held.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
PROGRAMS = {
    "scheduler": ([], 80_000),
    "fp8_gemm_plan": (["fp8_gemm_checks.cpp", "fp8_gemm_config.cpp", "status.cpp"], 1_000_000),
    "bf16_gemm_plan": (["bf16_gemm_checks.cpp", "bf16_gemm_config.cpp", "status.cpp"], 10_000),
    "mla_decode_plan": (["mla_decode_plan.cpp"], 6_000),
    "pipeline": ([], 5_000),
    "quantize": ([], 100_000_000),
    "stream_k": ([], 10_000),
    "divisor": ([], 1_000_000),
}
"""Program -> the sources of csrc/launch that it links, and how many cases it must come to."""


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_case_holds(program, tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources, at_least = PROGRAMS[program]
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    # mock/ comes first: it stands in for what only a GPU has.
    includes = [f"-I{HERE / 'mock'}", f"-I{HERE}", f"-I{CSRC}"]
    files = [HERE / f"{program}.cpp", *(CSRC / "launch" / source for source in sources)]
    built = subprocess.run(
        [compiler, *flags, *includes, *files, "-o", tmp_path / program], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([tmp_path / program], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    print(ran.stdout)
    assert int(re.match(r"\d+", ran.stdout)[0]) >= at_least, ran.stdout
