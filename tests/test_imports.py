"""Importing does nothing but define; and the ops work in hostile surroundings, forked and threaded."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from deepseek_ops.registry import OPS
from tests.samples import SAMPLES
from tests.test_every_op import bits, outputs

ROOT = Path(__file__).resolve().parent.parent

IMPORT_BUDGET = 0.25
"""Seconds that the import may take beyond torch's own, on a slow CI machine (about a fifth of it is usual)."""

GEMM = """
import torch, deepseek_ops
torch.manual_seed(0)
a, sfa = deepseek_ops.per_token_cast_to_fp8(torch.randn(5, 256))
b, sfb = deepseek_ops.per_block_cast_to_fp8(torch.randn(64, 256))
d = deepseek_ops.fp8_gemm_nt(a, sfa, b, sfb)
print(d.view(torch.int16).long().sum().item(), d.view(torch.int16)[::2].long().sum().item())
"""
"""A few ops whose result, printed as sums of its bits, must be the same wherever it runs."""


def run(code, *flags, env=None, cwd=ROOT):
    """Runs `code` in a fresh Python that finds the package, whatever the rest of its environment is."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **(env or {})}
    env = {name: value for name, value in env.items() if value is not None}
    done = subprocess.run([sys.executable, *flags, "-c", code], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def undisturbed():
    return run(GEMM)


def test_import_starts_no_process_opens_no_connection_and_writes_no_file():
    # torch and what else it loads come first: only what this package adds is watched.
    report = run(
        """
import json, sys
import torch, numpy, torch.library, torch.nn.functional
seen = []
def watch(event, args):
    if event.startswith(("subprocess.", "socket.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.putenv",
                         "os.unsetenv", "os.mkdir", "os.remove", "os.rename", "urllib.", "shutil.", "tempfile.")):
        seen.append([event, repr(args)])
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        seen.append([event, repr(args)])
sys.addaudithook(watch)
import deepseek_ops
print(json.dumps(seen))
"""
    )
    assert json.loads(report) == []


def test_import_leaves_cuda_alone():
    code = "import torch, deepseek_ops; assert not torch.cuda.is_initialized()"
    run(code)
    run(code, env={"CUDA_VISIBLE_DEVICES": ""})


def test_import_leaves_torch_s_settings_alone():
    run(
        """
import torch
def settings():
    return (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed(),
            torch.get_rng_state().sum().item(), torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())
before = settings()
import deepseek_ops
assert settings() == before
"""
    )


def test_import_is_quick(record_property):
    code = "import time, torch; start = time.perf_counter(); import deepseek_ops; print(time.perf_counter() - start)"
    seconds = min(float(run(code)) for _ in range(3))
    record_property("import_seconds", seconds)
    print(f"import deepseek_ops: {seconds * 1e3:.0f} ms beyond torch")
    assert seconds < IMPORT_BUDGET


@pytest.mark.parametrize("flag", ["-O", "-OO", "-Werror::DeprecationWarning:deepseek_ops"])
def test_ops_give_the_same_bits_under_interpreter_flags(flag, undisturbed):
    assert run(GEMM, flag) == undisturbed


@pytest.mark.parametrize(
    "env",
    [
        {"HOME": None, "USER": None, "LOGNAME": None},
        {"LANG": "tr_TR.UTF-8", "LC_ALL": "tr_TR.UTF-8"},
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_HOME": "a; touch marker", "CUDACXX": "a; touch marker"},
        {"DEEPSEEK_OPS_CUDA": "nonsense"},
        {"TMPDIR": "/nonexistent"},
    ],
    ids=lambda env: ",".join(env),
)
def test_ops_give_the_same_bits_in_a_hostile_environment(env, undisturbed, tmp_path):
    assert run(GEMM, env=env, cwd=tmp_path) == undisturbed
    assert list(tmp_path.iterdir()) == [], "a file was left behind"


def test_ops_work_in_a_folder_that_cannot_be_written(undisturbed, tmp_path):
    tmp_path.chmod(0o500)
    assert run(GEMM, cwd=tmp_path) == undisturbed


def test_no_compiler_of_the_path_is_run(undisturbed, tmp_path):
    marker = tmp_path / "marker"
    for name in ("nvcc", "g++", "gcc", "cc", "c++", "ninja", "cmake"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {marker}\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    assert run(GEMM, env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}) == undisturbed
    assert not marker.exists()


def test_errors_stay_typed_without_assertions():
    code = """
import torch, deepseek_ops
try:
    deepseek_ops.fp8_gemm_nt(torch.zeros(4, 32), None, None, None)
except TypeError as error:
    print(error)
"""
    assert run(code, "-OO") == "fp8_gemm_nt: a must be float8_e4m3fn, got float32"


def test_children_forked_after_the_import_can_compute():
    code = f"""
import os, traceback
def sums():
    found = []
    exec({GEMM!r}, {{"print": lambda *sums: found.append(sums)}})
    return found
wanted = sums()
children = []
for _ in range(8):
    pid = os.fork()
    if not pid:
        try:
            os._exit(0 if sums() == wanted else 3)
        except BaseException:
            traceback.print_exc()
            os._exit(4)
    children.append(pid)
print([os.waitpid(pid, 0)[1] >> 8 for pid in children])
"""
    # One thread (see run): a forked child cannot use the OpenMP threads of its parent, in any torch program.
    assert run(code) == str([0] * 8)


def test_two_threads_may_import_at_once(undisturbed):
    code = """
import threading
def load():
    import deepseek_ops
    found.append(len(deepseek_ops.__all__))
found = []
threads = [threading.Thread(target=load) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 2 and found[0] == found[1] > 5, found
"""
    assert run(code + GEMM) == undisturbed


@pytest.mark.parametrize("op", OPS)
def test_threads_get_the_bits_that_one_gets(op):
    def call():
        torch.manual_seed(0)
        return outputs(OPS[op], arguments())

    sample = SAMPLES[op]("cpu")

    def arguments():
        return tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in sample)

    alone = [bits(x) for x in call()]
    found = []
    threads = [threading.Thread(target=lambda: found.append([bits(x) for _ in range(5) for x in call()])) for _ in "12"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    for together in found:
        for i, x in enumerate(together):
            assert torch.equal(x, alone[i % len(alone)])


def test_the_numpy_door_needs_no_torch():
    run(
        """
import importlib.util, sys
sys.modules["torch"] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
import deepseek_ops
assert deepseek_ops.build_info["version"] == deepseek_ops.__version__
assert not any("libtorch" in line for line in open("/proc/self/maps"))
"""
    )
