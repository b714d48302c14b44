"""The command line: each command's output, and that what a user gets wrong ends in one sentence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepseek_ops.cli import _backend, main
from deepseek_ops.library import build_info
from deepseek_ops.model.checkpoint import Checkpoint
from deepseek_ops.model.tiny import write_tiny
from deepseek_ops.registry import OPS

CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lite")
    write_tiny(folder, "v2-lite", num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v3")
    write_tiny(folder, "v3", real_mla=True, num_hidden_layers=2)
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ----------------------------------------------------------------------------------------------------------- generate


def test_generate_prints_text_and_then_its_figures(lite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "generate", lite, "-p", "hello", "-n", 8, "--ignore-eos", *CPU)
    assert code == 0
    assert out.endswith("\n")
    assert re.search(r"^8 tokens; prefill of 6 in [\d.]+ ms; [\d.]+ tokens/s$", err, re.MULTILINE)
    # 2 layers of 64 + 16 numbers; 4 heads and 8 heads with keys and values of 32.
    assert "cache per token 320 bytes" in err
    assert "would take 1.0 KB" in err
    assert "with 8 heads 2.0 KB" in err


def test_generate_is_greedy_and_otherwise_follows_the_seed(lite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*options: object) -> str:
        code, out, err = run(capsys, "generate", lite, "-p", "abc", "-n", 8, "-q", "--ignore-eos", *CPU, *options)
        assert (code, err) == (0, "")
        return out

    assert text() == text("--seed", 5)
    hot = ["--temperature", 2.0, "--seed"]
    assert text(*hot, 1) == text(*hot, 1)
    assert text(*hot, 1) != text(*hot, 2)


def test_generate_takes_each_form_of_attention_and_each_cache(v3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--attn", "absorbed"], ["--attn", "expanded"], ["--cache", "fp8"], ["--gemm", "bf16"]):
        code, _, err = run(capsys, "generate", v3, "-p", "x", "-n", 2, "--ignore-eos", *CPU, *options)
        assert code == 0, err
        assert ("cache per token 1.3 KB" if "--cache" in options else "cache per token 2.3 KB") in err
    code, _, err = run(capsys, "generate", v3, "-p", "x", "-n", 2, "--max-layers", 1, "--dtype", "f32", *CPU)
    assert code == 0
    assert "cache per token 2.3 KB" in err  # one layer, four bytes


def test_generate_reads_a_prompt_from_standard_input(lite: Path) -> None:
    command = [sys.executable, "-m", "deepseek_ops", "generate", str(lite), "-p", "-", "-n", "3", *CPU]
    done = subprocess.run(command, input="größer".encode(), capture_output=True, env=os.environ | {"LC_ALL": "C"})
    assert done.returncode == 0
    assert b"prefill of 9 in" in done.stderr


# --------------------------------------------------------------------------------------------------------------- info


def test_info_says_what_runs_where(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert torch.__version__ in out
    for op in OPS:
        assert re.search(rf"^{op} +(kernel|reference)", out, re.MULTILINE), op


@pytest.mark.parametrize(
    ("archs", "capability", "backend"),
    [
        (["90a"], (9, 0), "kernel"),
        (["90a"], (8, 0), "reference"),
        (["90a"], (10, 0), "reference"),
        (["90a"], (12, 0), "reference"),
        (["80", "90a"], (8, 6), "kernel"),
        (["100f"], (10, 3), "kernel"),
        (["100f"], (12, 0), "reference"),
    ],
)
def test_a_kernel_runs_only_on_the_gpus_it_was_built_for(
    archs: list[str], capability: tuple[int, int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(build_info, "cuda", True)
    monkeypatch.setitem(build_info, "archs", archs)
    op = replace(OPS["fp8_gemm_nt"], has_kernel=True)
    assert _backend(op, capability)[0] == backend
    assert bool(_backend(op, capability)[1]) == (backend == "reference")
    assert _backend(replace(op, has_kernel=False), capability) == ("reference", "has no kernel")
    assert _backend(op, None) == ("reference", "no GPU, has a kernel")


def test_info_describes_a_checkpoint(v3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", v3, "--memory", 10)
    assert code == 0
    lines = [re.sub(r" {2,}", " | ", line) for line in out.splitlines()]
    for line in (
        "layers: | 2 of width 256, multi-token prediction: 1 layer",
        "attention: | 4 heads, latent 512 + 64",
        "latent, bf16 | 2.3 KB",
        "latent, FP8 | 1.3 KB | 56.9% of bf16",
        "multi-head attention | 4.1 KB | the latent is 56.25% of it",
        "in 10.0 GB (--memory)",
    ):
        assert line in lines, line
    assert "float8_e4m3fn" in out
    tokens = re.search(r"cache for (\d+) tokens in bf16, (\d+) in FP8", out)
    assert tokens is not None
    assert int(tokens[2]) > int(tokens[1]) > 10**6


def test_info_says_how_many_layers_fit_where_not_all_do(v3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needed = (2 << 30) / 1e9  # what is kept free
    assert "not even one layer fits" in run(capsys, "info", v3, "--memory", needed)[1]
    assert "its first 1 layers do (--max-layers 1)" in run(capsys, "info", v3, "--memory", needed + 2.5e-3)[1]


# ------------------------------------------------------------------------------------------------- tiny, quantize, ops


def test_tiny_and_quantize_write_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy, fp8 = tmp_path / "toy", tmp_path / "fp8"
    options = ["--family", "v2", "--layers", 2, "--shards", 2, "--seed", 3, "--no-yarn"]
    code, out, _ = run(capsys, "tiny", toy, *options)
    assert (code, out) == (0, f"{toy}: a toy DeepSeek-V2 of 2 layers, random weights\n")
    assert Checkpoint(toy).config.rope_scaling is None
    code, out, err = run(capsys, "quantize", toy, fp8, "--scale-fmt", "ue8m0", "-q")
    assert (code, err) == (0, "")
    assert re.fullmatch(r".*: [\d.]+ MB of weights, 5\d% of [\d.]+ MB\n", out)
    quantization = Checkpoint(fp8).config.quantization
    assert quantization is not None
    assert quantization.scale_fmt == "ue8m0"


def test_ops_fails_where_an_op_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for fine, code in ((True, 0), (False, 1)):
        monkeypatch.setattr(
            "deepseek_ops.op_table.print_op_table", lambda device, fine=fine: asked.append(device) or fine
        )
        assert run(capsys, "ops", *CPU)[0] == code
    assert asked == ["cpu", "cpu"]


# ------------------------------------------------------------------------------------------------------------- errors


def errors(lite: Path, tmp: Path) -> dict[str, tuple[list[object], str]]:
    """What a user may get wrong -> the arguments, and what the sentence says."""
    (tmp / "empty").mkdir()
    write_tiny(tmp / "no weights", "v2-lite", num_hidden_layers=1)
    (tmp / "no weights" / "model.safetensors").unlink()
    write_tiny(tmp / "small vocabulary", "v2-lite", vocab_size=64, bos_token_id=0, eos_token_id=1, num_hidden_layers=1)
    write_tiny(tmp / "v32", "v3", num_hidden_layers=1)
    config = tmp / "v32" / "config.json"
    config.write_text(config.read_text().replace("deepseek_v3", "deepseek_v32"))
    say: list[object] = ["-p", "x", "-n", 2, *CPU]
    return {
        "no folder": (["info", tmp / "none"], "none: there is no such folder"),
        "a file": (["info", lite / "config.json"], "not a folder"),
        "no config": (["info", tmp / "empty"], "config.json: not in"),
        "no weights": (["generate", tmp / "no weights", *say], "holds neither model.safetensors nor"),
        "V3.2": (["info", tmp / "v32"], r"deepseek_v32 .* not supported yet"),
        "generate without a folder": (["generate", tmp / "none", *say], "none"),
        "small vocabulary": (["generate", tmp / "small vocabulary", *say], "vocabulary of 64 is too small"),
        "no chat template": (["generate", lite, "--chat", *say], "no chat template"),
        "thinking without template": (["generate", lite, "--think", *say], "--think and --system need a chat template"),
        "FP8 cache of odd sizes": (["generate", lite, "--cache", "fp8", *say], r"512 \+ 64"),
        "more than the model's context": (["generate", lite, *say, "-n", 5000], "exceeds the model's 1024"),
        "unknown device": (["generate", lite, *say, "--device", "abacus"], "unknown device 'abacus'"),
        "device without support": (["generate", lite, *say, "--device", "meta"], "'meta' is not supported"),
        "GPU that is not there": (["generate", lite, *say, "--device", "cuda:99"], "there is no"),
        "tiny into a full folder": (["tiny", lite], "is not empty"),
        "tiny into a file": (["tiny", lite / "config.json"], "File exists|Not a directory"),
        "tiny without rights": (["tiny", "/proc/nowhere/x"], "No such file|[Pp]ermission"),
        "quantize into a full folder": (["quantize", lite, lite, "-q"], "is not empty"),
        "quantize nothing": (["quantize", tmp / "none", tmp / "out", "-q"], "no such folder"),
        "too many layers": (["tiny", tmp / "deep", "--layers", 5000], "num_hidden_layers must be"),
    }


def test_what_a_user_gets_wrong_ends_in_one_sentence(
    lite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (argv, message) in errors(lite, tmp_path).items():
        code, out, err = run(capsys, *argv)
        said = [line for line in err.splitlines() if "no tokenizer.json in the checkpoint: token ids" not in line]
        assert (code, out if argv[0] != "info" else "") == (1, ""), name
        assert len(said) == 1, (name, said)
        assert said[0].startswith("deepseek-ops: error: "), name
        assert re.search(message, said[0]), (name, said)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["generate"],
        ["generate", "x"],
        ["generate", "x", "-p", "y", "-n", "0"],
        ["generate", "x", "-p", "y", "-n", "many"],
        ["generate", "x", "-p", "y", "--temperature", "-1"],
        ["generate", "x", "-p", "y", "--temperature", "nan"],
        ["generate", "x", "-p", "y", "--top-p", "0"],
        ["generate", "x", "-p", "y", "--chat", "--raw"],
        ["generate", "x", "-p", "y", "--cache", "int4"],
        ["tiny", "x", "--family", "v9"],
        ["quantize", "x", "y", "--scale-fmt", "float"],
    ],
)
def test_wrong_arguments_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_help_and_version_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["generate", "--help"], ["info", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 0
        assert capsys.readouterr().out


def test_the_module_runs_without_loading_the_model_layer() -> None:
    code = "import sys, deepseek_ops.cli as cli; cli.main(['info']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "deepseek_ops.cli" in done.stderr.split()
    assert "deepseek_ops.model" not in done.stderr.split()
    done = subprocess.run([sys.executable, "-m", "deepseek_ops", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_goes_away_is_no_error(lite: Path) -> None:
    command = f"{sys.executable} -m deepseek_ops info {lite} | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.stdout.startswith("deepseek-ops:")
    assert "Traceback" not in done.stderr
