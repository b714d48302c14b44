"""A floating-point checkpoint turned into block FP8 in the format of the V3 release, and back.

Quantized are the projections of attention, MLPs and experts; embeddings, head, norms, router and MTP's `eh_proj` keep
their dtype. Both directions go shard by shard: at most one shard's output is in memory at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from deepseek_ops.quantize import per_block_cast_from_fp8, per_block_cast_to_fp8

from .checkpoint import SCALE_SUFFIX, Checkpoint, expected_tensors, write_checkpoint
from .config import MAX_CONFIG_BYTES, MAX_CONFIG_CONTAINERS, DeepseekConfig, Fp8Quantization, read_json

__all__ = ["dequantize_checkpoint", "quantize_checkpoint"]

COMPANIONS: Final = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json", "LICENSE", "LICENSE-MODEL"),
)
"""What is copied beside the weights. No code: nothing here needs any."""


def quantize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    scale_fmt: str | None = None,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> DeepseekConfig:
    """Writes a checkpoint in bfloat16, float16 or float32 as block FP8, its tokenizer files included.

    Each quantized `X.weight` becomes e4m3 with `X.weight_scale_inv`, one float32 scale per 128 x 128 block.

    Args:
        src: the checkpoint's folder.
        dst: made if it is not there; must be empty.
        scale_fmt: "ue8m0" rounds the scales up to powers of two, as V3.1 has them; None keeps them as they are.
        device: where to quantize.
        quiet: no progress bar.

    Returns:
        The new checkpoint's configuration.

    Raises:
        CheckpointError: `src` is broken.
        ValueError: `src` is in FP8 already, or an unknown `scale_fmt`.
        FileExistsError: `dst` is not empty.
    """
    checkpoint = Checkpoint(src)
    if checkpoint.config.quantization:
        raise ValueError(f"{src}: is in FP8 already")
    config = replace(checkpoint.config, quantization=Fp8Quantization(scale_fmt=scale_fmt))
    to_quantize = {name.removesuffix(SCALE_SUFFIX) for name in expected_tensors(config) if name.endswith(SCALE_SUFFIX)}

    def convert(name: str, x: Tensor) -> dict[str, Tensor]:
        if name not in to_quantize:
            return {name: x}
        weight, scale = per_block_cast_to_fp8(x.to(device), use_ue8m0=scale_fmt == "ue8m0")
        return {name: weight.cpu(), name + SCALE_SUFFIX: scale.cpu()}

    shards = _shards(checkpoint, quiet)
    converted = ({k: v for name, x in shard for k, v in convert(name, x).items()} for shard in shards)
    raw = _raw_config(checkpoint) | {"quantization_config": config.to_dict()["quantization_config"]}
    write_checkpoint(dst, raw, converted, _num_shards(checkpoint))
    _copy_companions(checkpoint, Path(dst))
    return config


def dequantize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> DeepseekConfig:
    """Writes a block FP8 checkpoint with its quantized weights multiplied out in `dtype`; as `quantize_checkpoint`.

    Raises:
        CheckpointError: `src` is broken.
        ValueError: `src` is not in FP8.
        FileExistsError: `dst` is not empty.
    """
    checkpoint = Checkpoint(src)
    if not checkpoint.config.quantization:
        raise ValueError(f"{src}: is not in FP8")
    name_of_dtype = str(dtype).removeprefix("torch.")
    config = replace(checkpoint.config, quantization=None, torch_dtype=name_of_dtype)

    def convert(name: str, x: Tensor) -> Tensor:
        if name + SCALE_SUFFIX not in checkpoint.tensors:
            return x
        scale = checkpoint.read(name + SCALE_SUFFIX)  # may lie in another shard
        return per_block_cast_from_fp8(x.to(device), scale.to(device), out_dtype=dtype).cpu()

    shards = _shards(checkpoint, quiet)
    converted = ({name: convert(name, x) for name, x in s if not name.endswith(SCALE_SUFFIX)} for s in shards)
    raw = _raw_config(checkpoint)
    del raw["quantization_config"]
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = name_of_dtype
    write_checkpoint(dst, raw, converted, _num_shards(checkpoint))
    _copy_companions(checkpoint, Path(dst))
    return config


def _files(checkpoint: Checkpoint) -> list[Path]:
    return sorted({info.file for info in checkpoint.tensors.values()})


def _num_shards(checkpoint: Checkpoint) -> int:
    return len(_files(checkpoint))


def _shards(checkpoint: Checkpoint, quiet: bool) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """The tensors of each file of the checkpoint. One stream goes through all, for one progress bar."""
    stream = checkpoint.stream(quiet=quiet)
    for file in _files(checkpoint):
        count = sum(info.file == file for info in checkpoint.tensors.values())
        yield (next(stream) for _ in range(count))


def _raw_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's own config.json, less its pointer to code that is not copied."""
    raw = read_json(checkpoint.find("config.json"), MAX_CONFIG_BYTES, MAX_CONFIG_CONTAINERS)
    raw.pop("auto_map", None)
    return raw


def _copy_companions(checkpoint: Checkpoint, dst: Path) -> None:
    for name in COMPANIONS:
        if os.path.lexists(checkpoint.folder / name):
            shutil.copyfile(checkpoint.find(name), dst / name)
