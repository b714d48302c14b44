"""Checkpoints to block FP8 and back: the right tensors, in the release's format, with the format's own error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepseek_ops.model.checkpoint import Checkpoint, UnsafePath, expected_tensors
from deepseek_ops.model.config import DeepseekConfig, Fp8Quantization
from deepseek_ops.model.quantization import dequantize_checkpoint, quantize_checkpoint
from deepseek_ops.model.tiny import write_tiny
from deepseek_ops.quantize import per_block_cast_from_fp8


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("family", ["v2-lite", "v2", "v3"])
def test_the_result_is_a_checkpoint_of_the_release_format(family: str, scale_fmt: str | None, tmp_path: Path) -> None:
    src, dst = tmp_path / "bf16", tmp_path / "fp8"
    config = write_tiny(src, family, fp8=False, num_shards=3, real_mla=True)
    written = quantize_checkpoint(src, dst, scale_fmt=scale_fmt, quiet=True)
    checkpoint = Checkpoint(dst)
    assert checkpoint.config == written == replace(config, quantization=Fp8Quantization(scale_fmt=scale_fmt))
    assert checkpoint.tensors.keys() == expected_tensors(written).keys()
    assert len(list(dst.glob("*.safetensors"))) == 3
    kv_a = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert checkpoint.tensors[kv_a + "_scale_inv"].shape == (5, 2)  # 576 rows: half a block at the end

    before = dict(Checkpoint(src).stream())
    after = dict(checkpoint.stream())
    for name, x in before.items():
        if name + "_scale_inv" not in after:
            assert torch.equal(after[name], x), name
            continue
        scale = after[name + "_scale_inv"]
        if scale_fmt == "ue8m0":
            assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5)), name
        restored = per_block_cast_from_fp8(after[name], scale, out_dtype=torch.float32)
        # Half a step of e4m3: relative 2^-4 for normal numbers, absolute 2^-10 of the scale for subnormal ones.
        rows = scale.repeat_interleave(128, 0)[: x.shape[0]]
        step = rows.repeat_interleave(128, 1)[:, : x.shape[1]] * 2**-10
        limit = torch.maximum(x.float().abs() * 2**-4, step) * (1 + 1e-5)
        assert bool(((restored - x.float()).abs() <= limit).all(-1).all()), name


def test_dequantizing_gives_back_what_the_quantized_one_meant(tmp_path: Path) -> None:
    config = write_tiny(tmp_path / "fp8", "v3", num_shards=2)
    written = dequantize_checkpoint(tmp_path / "fp8", tmp_path / "f32", dtype=torch.float32, quiet=True)
    assert written == replace(config, quantization=None, torch_dtype="float32")
    fp8, f32 = dict(Checkpoint(tmp_path / "fp8").stream()), dict(Checkpoint(tmp_path / "f32").stream())
    assert DeepseekConfig.from_json(tmp_path / "f32") == written
    for name, x in f32.items():
        scale = fp8.get(name + "_scale_inv")
        if scale is None:
            assert torch.equal(x, fp8[name]), name
        else:
            rows, columns = torch.arange(x.shape[0]) // 128, torch.arange(x.shape[1]) // 128
            assert torch.equal(x, fp8[name].float() * scale[rows][:, columns]), name
    # And quantizing that again changes nothing, since every block's largest value maps to 448 again.
    quantize_checkpoint(tmp_path / "f32", tmp_path / "again", quiet=True)
    again = dict(Checkpoint(tmp_path / "again").stream())
    worst = max(float((again[n].float() - fp8[n].float()).abs().max()) for n in fp8 if fp8[n].dtype.itemsize == 1)
    assert worst <= 32  # one step at 448, where scale = amax / 448 rounds differently


def test_tokenizer_files_come_along_and_code_does_not(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a", "v2-lite")
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    raw |= {"auto_map": {"AutoModel": "modeling.Model"}, "my_own_key": 7}
    (tmp_path / "a" / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "modeling.py", "pytorch_model.bin"):
        (tmp_path / "a" / name).write_text(name)
    quantize_checkpoint(tmp_path / "a", tmp_path / "b", quiet=True)
    names = {file.name for file in (tmp_path / "b").iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    }
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["my_own_key"] == 7
    assert "auto_map" not in written


def test_a_companion_that_leads_out_of_the_folder_is_not_copied(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a", "v2-lite")
    (tmp_path / "a" / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(UnsafePath):
        quantize_checkpoint(tmp_path / "a", tmp_path / "b", quiet=True)
    assert not (tmp_path / "b" / "tokenizer.json").exists()


def test_what_is_in_fp8_already_or_not_at_all_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "fp8", "v3")
    write_tiny(tmp_path / "bf16", "v2")
    with pytest.raises(ValueError, match="in FP8 already"):
        quantize_checkpoint(tmp_path / "fp8", tmp_path / "out")
    with pytest.raises(ValueError, match="not in FP8"):
        dequantize_checkpoint(tmp_path / "bf16", tmp_path / "out")
    with pytest.raises(ValueError, match="scale_fmt must be null or ue8m0"):
        quantize_checkpoint(tmp_path / "bf16", tmp_path / "out", scale_fmt="float")
    with pytest.raises(FileExistsError):
        quantize_checkpoint(tmp_path / "bf16", tmp_path / "fp8", quiet=True)
    assert not (tmp_path / "out").exists()
