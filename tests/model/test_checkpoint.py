"""Checkpoint folders: what they must hold, how they stream, and a collection of hostile ones that must be refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deepseek_ops.model.checkpoint import (
    Checkpoint,
    MalformedCheckpoint,
    MissingFile,
    MissingTensor,
    UnsafePath,
    expected_tensors,
    write_checkpoint,
)
from deepseek_ops.model.config import RELEASED
from deepseek_ops.model.tiny import FAMILIES, random_weights, tiny_config, write_tiny

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "hidden_size": 160,
    "moe_intermediate_size": 32,
}
KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
NORM = "model.norm.weight"


# --------------------------------------------------------------------------------------------------- expected tensors


def test_v3_has_the_names_and_shapes_of_the_release() -> None:
    specs = expected_tensors(RELEASED["v3"])
    shapes = {
        "model.embed_tokens.weight": (129280, 7168),
        "model.layers.0.self_attn.q_a_proj.weight": (1536, 7168),
        "model.layers.0.self_attn.q_b_proj.weight": (128 * 192, 1536),
        KV_A: (576, 7168),
        KV_A + "_scale_inv": (5, 56),
        "model.layers.0.self_attn.kv_b_proj.weight": (128 * 256, 512),
        "model.layers.60.self_attn.o_proj.weight": (7168, 16384),
        "model.layers.2.mlp.gate_proj.weight": (18432, 7168),
        "model.layers.3.mlp.gate.weight": (256, 7168),
        "model.layers.3.mlp.gate.e_score_correction_bias": (256,),
        "model.layers.60.mlp.experts.255.down_proj.weight": (7168, 2048),
        "model.layers.60.mlp.experts.255.down_proj.weight_scale_inv": (56, 16),
        "model.layers.61.eh_proj.weight": (7168, 14336),
        "model.layers.61.shared_head.head.weight": (129280, 7168),
        "model.layers.61.mlp.experts.0.up_proj.weight": (2048, 7168),
    }
    assert {name: specs[name].shape for name in shapes} == shapes
    assert specs[KV_A].dtypes == (torch.float8_e4m3fn,)
    assert specs[KV_A + "_scale_inv"].dtypes == (torch.float32,)
    for name in ("model.layers.61.eh_proj.weight", "model.layers.3.mlp.gate.weight", "lm_head.weight", NORM):
        assert torch.bfloat16 in specs[name].dtypes
        assert name + "_scale_inv" not in specs
    assert "model.layers.62.input_layernorm.weight" not in specs
    assert "model.layers.2.mlp.gate.weight" not in specs


def test_v2_lite_has_one_query_projection_and_no_router_bias() -> None:
    specs = expected_tensors(RELEASED["v2-lite"])
    assert specs["model.layers.1.self_attn.q_proj.weight"].shape == (16 * 192, 2048)
    assert specs["model.layers.1.mlp.shared_experts.up_proj.weight"].shape == (2 * 1408, 2048)
    assert not any("q_a_proj" in name or "bias" in name or "scale" in name for name in specs)


# ---------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_written_streams_back_in_disk_order(family: str, num_shards: int, tmp_path: Path) -> None:
    config = write_tiny(tmp_path, family, num_shards=num_shards, **SMALL)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.config == config
    assert checkpoint.has_mtp == (config.model_type == "deepseek_v3")
    wanted = dict(random_weights(config))
    streamed = list(checkpoint.stream())
    assert {name for name, _ in streamed} == wanted.keys() == checkpoint.tensors.keys()
    for name, tensor in streamed:
        assert tensor.dtype == wanted[name].dtype == checkpoint.tensors[name].dtype
        assert tensor.shape == wanted[name].shape == checkpoint.tensors[name].shape
        assert torch.equal(tensor.view(torch.uint8), wanted[name].view(torch.uint8)), name
    places = [(checkpoint.tensors[name].file, checkpoint.tensors[name].offset) for name, _ in streamed]
    assert places == sorted(places)
    assert len({file for file, _ in places}) == num_shards


def test_chosen_tensors_stream_alone(tmp_path: Path) -> None:
    write_tiny(tmp_path, "v3", num_shards=3, **SMALL)
    checkpoint = Checkpoint(tmp_path)
    assert sorted(name for name, _ in checkpoint.stream([NORM, KV_A])) == sorted([NORM, KV_A])
    assert checkpoint.read(NORM).shape == (160,)
    with pytest.raises(KeyError):
        next(checkpoint.stream(["model.norm.bias"]))


def test_tensors_live_on_when_the_stream_is_gone_and_writing_to_them_leaves_the_file_alone(tmp_path: Path) -> None:
    config = write_tiny(tmp_path, "v2-lite", **SMALL)
    checkpoint = Checkpoint(tmp_path)
    norm = checkpoint.read(NORM)
    norm.zero_()
    assert torch.equal(norm, torch.zeros_like(norm))
    assert torch.equal(checkpoint.read(NORM), dict(random_weights(config))[NORM])


def test_safetensors_agrees_on_where_everything_lies(tmp_path: Path) -> None:
    write_tiny(tmp_path, "v3", **SMALL)
    checkpoint = Checkpoint(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as theirs:
        assert set(theirs.keys()) == checkpoint.tensors.keys()
        for name, tensor in checkpoint.stream():
            assert torch.equal(tensor.view(torch.uint8), theirs.get_tensor(name).view(torch.uint8)), name


def test_a_tensor_at_an_odd_offset_is_read_right(tmp_path: Path) -> None:
    config = write_tiny(tmp_path, "v2-lite", **SMALL)
    weights = dict(random_weights(config))
    order = sorted(weights, key=lambda name: name != NORM)
    header, begin = {}, 0
    for name in order:
        header[name] = {
            "dtype": "BF16",
            "shape": list(weights[name].shape),
            "data_offsets": [begin, begin + weights[name].nbytes],
        }
        begin += weights[name].nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (1 - len(raw) % 2)  # data then begins at an odd byte
    data = b"".join(weights[name].contiguous().view(torch.uint8).numpy().tobytes() for name in order)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.tensors[NORM].offset % 2 == 1
    for name, tensor in checkpoint.stream():
        assert torch.equal(tensor, weights[name]), name
        assert tensor.data_ptr() % tensor.element_size() == 0, name


def test_loading_never_holds_the_weights_twice(tmp_path: Path) -> None:
    """A child streams 96 MB through one small buffer; its own memory must not grow by a fraction of that."""
    write_tiny(tmp_path, "v2-lite", **SMALL | {"vocab_size": 200_000, "torch_dtype": "float32"})
    code = (
        "import sys, torch\n"
        "from deepseek_ops.model.checkpoint import Checkpoint\n"
        "anonymous = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])\n"
        "c = Checkpoint(sys.argv[1])\n"
        "before, most = anonymous(), 0\n"
        "for _, x in c.stream(): x.view(torch.uint8).flatten()[::4096].sum(); most = max(most, anonymous())\n"
        "print(c.nbytes // 1024, most - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    total, grown = map(int, run.stdout.split())
    assert total > 200_000
    assert grown < total / 8


def test_the_first_layers_need_only_their_own_shards(tmp_path: Path) -> None:
    config = tiny_config("v3", num_hidden_layers=4)
    by_layer: dict[int, dict[str, torch.Tensor]] = {}
    specs = expected_tensors(config)
    for name, tensor in random_weights(config):
        layer_idx = specs[name].layer_idx
        by_layer.setdefault(0 if layer_idx is None else layer_idx + 1, {})[name] = tensor
    write_checkpoint(tmp_path, config.to_dict(), by_layer.values(), len(by_layer))
    for shard in (4, 5, 6):
        (tmp_path / f"model-{shard:05}-of-000006.safetensors").unlink()
    with pytest.raises(MissingFile, match="model-00004-of-000006"):
        Checkpoint(tmp_path)
    checkpoint = Checkpoint(tmp_path, max_layers=2)
    assert checkpoint.config == config.first_layers(2)
    assert checkpoint.tensors.keys() == expected_tensors(config.first_layers(2)).keys()
    assert not checkpoint.has_mtp
    with pytest.raises(MissingFile):
        Checkpoint(tmp_path, max_layers=3)


def test_layers_that_are_cut_off_are_reported_as_unused(tmp_path: Path) -> None:
    write_tiny(tmp_path, "v3")
    checkpoint = Checkpoint(tmp_path, max_layers=2)
    assert checkpoint.unused
    assert all(name.startswith(("model.layers.2.", "model.layers.3.", "model.layers.4.")) for name in checkpoint.unused)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def drop(tensors: dict[str, torch.Tensor], *parts: str) -> None:
    for name in [name for name in tensors if any(part in name for part in parts)]:
        del tensors[name]


def test_mtp_layers_may_be_absent_and_so_may_their_copies_of_embedding_and_head(tmp_path: Path) -> None:
    write_tiny(tmp_path, "v3", **SMALL)
    rewrite(tmp_path, lambda tensors: drop(tensors, "layers.2.embed_tokens", "layers.2.shared_head.head"))
    assert Checkpoint(tmp_path).has_mtp
    rewrite(tmp_path, lambda tensors: drop(tensors, "layers.2."))
    assert not Checkpoint(tmp_path).has_mtp


def test_half_of_an_mtp_layer_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path, "v3", **SMALL)
    rewrite(tmp_path, lambda tensors: drop(tensors, "layers.2.eh_proj"))
    with pytest.raises(MissingTensor, match=r"layers\.2\.eh_proj"):
        Checkpoint(tmp_path)


def test_rotary_buffers_are_tolerated_and_reported(tmp_path: Path) -> None:
    write_tiny(tmp_path, "v2-lite", **SMALL)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.ones(8)}))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.unused == [name]
    assert name not in checkpoint.tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_what_is_not_quantized_may_have_any_floating_point_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    write_tiny(tmp_path, "v3", **SMALL)
    rewrite(tmp_path, lambda tensors: tensors.update({NORM: tensors[NORM].to(dtype)}))
    assert Checkpoint(tmp_path).tensors[NORM].dtype == dtype


def test_a_tied_head_may_be_absent_or_present(tmp_path: Path) -> None:
    write_tiny(tmp_path, "v2", tie_word_embeddings=True, **SMALL)
    assert "lm_head.weight" not in Checkpoint(tmp_path).tensors
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" in Checkpoint(tmp_path).tensors


def test_the_hugging_face_cache_with_its_links_opens(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    write_tiny(snapshot, "v2-lite", num_shards=2, **SMALL)
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        shutil.move(file, blobs / f"hash-of-{file.name}")
        file.symlink_to(f"../../blobs/hash-of-{file.name}")
    assert len(dict(Checkpoint(snapshot).stream())) > 10
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(snapshot, elsewhere / "copy", symlinks=True)
    (elsewhere / "copy" / "config.json").unlink()
    (elsewhere / "copy" / "config.json").symlink_to(blobs / "hash-of-config.json")
    with pytest.raises(UnsafePath):
        Checkpoint(elsewhere / "copy")


def test_links_may_lead_to_a_root_that_the_caller_names(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a", "v2-lite", **SMALL)
    (tmp_path / "store").mkdir()
    shutil.move(tmp_path / "a" / "model.safetensors", tmp_path / "store" / "weights")
    (tmp_path / "a" / "model.safetensors").symlink_to(tmp_path / "store" / "weights")
    with pytest.raises(UnsafePath, match="leads out of"):
        Checkpoint(tmp_path / "a")
    assert Checkpoint(tmp_path / "a", blobs_root=tmp_path / "store").tensors


def test_a_shard_that_changes_its_size_after_opening_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path, "v2-lite", **SMALL)
    checkpoint = Checkpoint(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(MalformedCheckpoint, match="size changed"):
        list(checkpoint.stream())


def test_writing_does_not_touch_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(FileExistsError):
        write_tiny(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]
