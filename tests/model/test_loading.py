"""Every tensor of a checkpoint finds its place, once, in the wanted format, with little memory beside the model."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepseek_ops.model import DeepseekConfig
from deepseek_ops.model.checkpoint import CheckpointError, expected_tensors, write_checkpoint
from deepseek_ops.model.config import RELEASED
from deepseek_ops.model.linear import Fp8Linear
from deepseek_ops.model.loading import find_place, with_scales
from deepseek_ops.model.tiny import random_weights
from tests.model.conftest import FP8, V3, VARIANTS
from tests.model.support import forward, load_model, prompt
from tests.support import relative_error

FolderOf = Callable[[DeepseekConfig], Path]
MTP = VARIANTS["V3 with MTP, two dense layers"]


@pytest.mark.parametrize("family", ["v2-lite", "v2", "v3"])
def test_every_tensor_of_a_release_has_a_place_of_its_own(family: str) -> None:
    config = RELEASED[family]
    names = [n for n in expected_tensors(config) if not n.endswith("_scale_inv")]
    places = {name: find_place(name, config) for name in names}
    without = {name.split(".", 3)[3] for name, place in places.items() if place is None}
    assert without <= {"embed_tokens.weight", "shared_head.head.weight"}  # MTP's copies of the main model's
    found = [place for place in places.values() if place is not None]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", ["V2-Lite", "V3", "V3 with MTP, two dense layers", "V3 without experts"])
def test_every_weight_of_the_model_is_filled(name: str, checkpoint_of: FolderOf) -> None:
    model = load_model(checkpoint_of(VARIANTS[name]), mtp=True, quiet=True)
    for path, parameter in model.named_parameters():
        assert parameter.any(), path
        assert not parameter.requires_grad, path
        if parameter.dim() > 1:
            assert parameter.flatten(0, -2).any(-1).all(), f"{path}: rows left empty"


def test_parts_land_in_order(checkpoint_of: FolderOf) -> None:
    folder = checkpoint_of(V3)
    tensors = load_file(folder / "model.safetensors")
    model = load_model(folder, quiet=True)
    layer, prefix = model.layers[1], "model.layers.1."
    qkv = torch.cat([tensors[prefix + f"self_attn.{n}.weight"] for n in ("q_a_proj", "kv_a_proj_with_mqa")])
    assert torch.equal(layer.self_attn.qkv_a_proj.weight, qkv)
    for e in range(16):
        gate, up, down = (tensors[f"{prefix}mlp.experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down"))
        assert torch.equal(layer.mlp.experts.gate_up_proj.weight[e], torch.cat([gate, up]))
        assert torch.equal(layer.mlp.experts.down_proj.weight[e], down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_of_all_but_the_gate(dtype: torch.dtype, checkpoint_of: FolderOf) -> None:
    model = load_model(checkpoint_of(V3), dtype=dtype, quiet=True)
    for path, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".mlp.gate." in path else dtype), path
    assert model.make_cache([1]).pages[0].dtype == dtype


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gates_weight_keeps_its_values(dtype: torch.dtype, stored: str, checkpoint_of: FolderOf) -> None:
    """In bfloat16 only where nothing is rounded for it; of the modules for multi-token prediction, too."""
    folder = checkpoint_of(replace(MTP, torch_dtype=stored))
    tensors = load_file(folder / "model.safetensors")
    model = load_model(folder, dtype=dtype, mtp=True, quiet=True)
    for layer, gate in ((2, model.layers[2].mlp.gate), (3, model.mtp[0].block.mlp.gate)):
        assert gate.weight.dtype == (dtype if stored == "bfloat16" else torch.float32)
        assert not gate.weight.requires_grad
        assert torch.equal(gate.weight.float(), tensors[f"model.layers.{layer}.mlp.gate.weight"].float())


def test_the_gates_bias_keeps_its_float32_bits_in_a_bfloat16_model(checkpoint_of: FolderOf) -> None:
    folder = checkpoint_of(replace(V3, torch_dtype="bfloat16"))
    bias = load_file(folder / "model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"]
    model = load_model(folder, quiet=True)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.layers[1].mlp.gate.e_score_correction_bias, bias)
    assert not torch.equal(bias, bias.bfloat16().float())


def test_float16_checkpoints_are_computed_in_bfloat16(checkpoint_of: FolderOf) -> None:
    assert load_model(checkpoint_of(replace(V3, torch_dtype="float16")), quiet=True).dtype == torch.bfloat16


def test_fp8_weights_keep_their_bits(checkpoint_of: FolderOf) -> None:
    folder = checkpoint_of(FP8)
    tensors = load_file(folder / "model.safetensors")
    model = load_model(folder, quiet=True)
    layer = model.layers[1].mlp.experts.gate_up_proj
    assert isinstance(layer, Fp8Linear)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert torch.equal(layer.weight[3, 128:].view(torch.uint8), tensors[name].view(torch.uint8))
    assert torch.equal(layer.weight_scale_inv[3, 1:], tensors[name + "_scale_inv"])


def test_a_float_checkpoint_can_be_quantized_while_loading(checkpoint_of: FolderOf) -> None:
    folder = checkpoint_of(replace(FP8, quantization=None))
    tokens = prompt(20)
    (want,), (got,) = (forward(load_model(folder, gemm=gemm, quiet=True), [tokens]) for gemm in ("auto", "fp8"))
    assert 0.005 < relative_error(got, want) < 0.3


def test_scales_may_come_before_or_long_after_their_weight() -> None:
    a, b, c, sa, sb = (torch.tensor(float(i)) for i in range(5))
    stream = [("b_scale_inv", sb), ("a", a), ("c", c), ("b", b), ("a_scale_inv", sa)]
    got = list(with_scales(iter(stream), [name for name, _ in stream]))
    assert got == [("c", c, None), ("b", b, sb), ("a", a, sa)]


def test_mtp_is_loaded_on_request_only(checkpoint_of: FolderOf, caplog: pytest.LogCaptureFixture) -> None:
    folder = checkpoint_of(MTP)
    with caplog.at_level(logging.INFO):
        assert len(load_model(folder).mtp) == 0
    assert "mtp=True" in caplog.text
    assert len(load_model(folder, mtp=True, quiet=True).mtp) == 1
    assert len(load_model(folder, mtp=True, max_layers=2, quiet=True).mtp) == 0
    assert len(load_model(checkpoint_of(V3), mtp=True, quiet=True).mtp) == 0


def test_unused_tensors_are_reported(checkpoint_of: FolderOf, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_model(checkpoint_of(V3), max_layers=2)
    assert "not used: model.layers.2." in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load_model(checkpoint_of(V3), quiet=True)
    assert caplog.text == ""


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    weights = dict(random_weights(V3))
    del weights["model.layers.1.self_attn.o_proj.weight"]
    write_checkpoint(tmp_path, V3.to_dict(), [weights])
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight"):
        load_model(tmp_path, quiet=True)


def test_both_dialects_and_several_shards_load_alike(tmp_path: Path, checkpoint_of: FolderOf) -> None:
    weights = list(random_weights(V3))
    middle = len(weights) // 2
    shards = [dict(weights[:middle]), dict(weights[middle:])]
    write_checkpoint(tmp_path, V3.to_dict("transformers5"), shards, 2)
    tokens = prompt(10)
    (want,), (got,) = (forward(load_model(f, quiet=True), [tokens]) for f in (checkpoint_of(V3), tmp_path))
    assert torch.equal(got, want)


def test_a_cache_that_does_not_fit_is_refused_before_loading(checkpoint_of: FolderOf) -> None:
    with pytest.raises(ValueError, match=r"512 \+ 64 channels"):
        load_model(checkpoint_of(V3), cache_dtype=torch.float8_e4m3fn, quiet=True)
    with pytest.raises(TypeError, match=r"the model's torch\.float32 or torch\.float8_e4m3fn, got torch\.bfloat16"):
        load_model(checkpoint_of(V3), cache_dtype=torch.bfloat16, quiet=True)


def test_loading_holds_no_second_copy(tmp_path: Path) -> None:
    """The process grows by the model and a little, not by twice the model."""
    import subprocess
    import sys

    config = replace(V3, hidden_size=512, moe_intermediate_size=256, n_routed_experts=64, num_hidden_layers=2)
    write_checkpoint(tmp_path, config.to_dict(), [dict(random_weights(config))])
    code = f"""
import torch
from deepseek_ops.model import load_model
from deepseek_ops.model.checkpoint import Checkpoint
def anonymous():
    return sum(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
import threading, time
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
model = load_model({str(tmp_path)!r}, device="cpu", quiet=True)
done = True; thread.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak - before) / size)
"""
    ratio = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.9 < ratio < 1.6  # torch itself takes 0.3 of so small a model; a second copy would make it 2
