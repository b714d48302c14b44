"""A model's parameters, its bytes, and what fits: from its config and headers, with no weights read.

A token's cache in MLA is one latent of `kv_lora_rank + qk_rope_head_dim` numbers per layer for all heads; multi-head
attention of the same shape would keep a key and a value of `v_head_dim` for each head (DeepSeek-V2 report,
arXiv:2405.04434, section 2.1.4).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final, Literal

import torch

from deepseek_ops.numeric import FP8, ceil_div

from .checkpoint import SCALE_SUFFIX, Checkpoint, TensorSpec, expected_tensors
from .config import DeepseekConfig

__all__ = [
    "CacheSizes",
    "Fit",
    "ParameterCount",
    "cache_bytes_per_token",
    "cache_sizes",
    "count_parameters",
    "fit",
    "weight_bytes_by_dtype",
    "weight_bytes_by_layer",
    "weight_bytes_by_part",
]

RESERVE_BYTES: Final = 2 << 30
"""Left free by `fit`: activations, workspaces, the CUDA context."""


# ------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the main model; scaling factors of FP8 weights are not counted."""

    total: int
    active: int
    """That one token goes through: without the embedding, and with only the experts that it is routed to."""
    by_part: dict[str, int]
    """By "embedding", "attention", "dense MLP", "routed experts", "shared experts", "gate", "norms", "head"."""
    mtp: int
    """Of the multi-token prediction layers, without their copies of embedding and head; not in `total`."""


def count_parameters(config: DeepseekConfig) -> ParameterCount:
    """Counts the parameters that `config` implies."""
    by_part: Counter[str] = Counter()
    mtp = 0
    for name, spec in expected_tensors(config).items():
        if name.endswith(SCALE_SUFFIX) or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if _is_mtp(spec, config):
            mtp += 0 if spec.is_optional else spec.numel
        else:
            by_part[spec.part] += spec.numel
    total = sum(by_part.values())
    experts = by_part["routed experts"]
    chosen = experts * config.num_experts_per_tok // (config.n_routed_experts or 1)
    # A head that is tied to the embedding is still gone through.
    embedding = 0 if config.tie_word_embeddings else by_part["embedding"]
    return ParameterCount(total, total - embedding - experts + chosen, dict(by_part), mtp)


def _is_mtp(spec: TensorSpec, config: DeepseekConfig) -> bool:
    return spec.layer_idx is not None and spec.layer_idx >= config.num_hidden_layers


# ------------------------------------------------------------------------------------------------------------ weights


def weight_bytes_by_part(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes in the files by part, the scales with their weights; MTP layers are the part "MTP"."""
    expected = expected_tensors(checkpoint.config)
    by_part: Counter[str] = Counter()
    for name, info in checkpoint.tensors.items():
        spec = expected[name]
        by_part["MTP" if _is_mtp(spec, checkpoint.config) else spec.part] += info.nbytes
    return dict(by_part)


def weight_bytes_by_dtype(checkpoint: Checkpoint) -> dict[torch.dtype, tuple[int, int]]:
    """(number of tensors, bytes) in the files, by dtype."""
    table: dict[torch.dtype, tuple[int, int]] = {}
    for info in checkpoint.tensors.values():
        count, nbytes = table.get(info.dtype, (0, 0))
        table[info.dtype] = count + 1, nbytes + info.nbytes
    return table


def weight_bytes_by_layer(config: DeepseekConfig, checkpoint: Checkpoint | None = None) -> tuple[int, list[int]]:
    """Bytes that the loaded main model takes: outside the layers, and for each layer.

    `kv_b_proj` of an FP8 model counts in the config's dtype: absorbed attention keeps it dequantized.

    Args:
        checkpoint: take the dtypes from its headers; otherwise they are the config's.
    """
    outside = 0
    layers = [0] * config.num_hidden_layers
    for name, spec in expected_tensors(config).items():
        if _is_mtp(spec, config) or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        itemsize = (config.dtype if len(spec.dtypes) > 1 else spec.dtypes[0]).itemsize
        if checkpoint is not None and name in checkpoint.tensors:
            itemsize = checkpoint.tensors[name].dtype.itemsize
        if ".kv_b_proj." in name and config.quantization:
            itemsize = config.dtype.itemsize if FP8 in spec.dtypes else 0
        if spec.layer_idx is None:
            outside += spec.numel * itemsize
        else:
            layers[spec.layer_idx] += spec.numel * itemsize
    return outside, layers


# -------------------------------------------------------------------------------------------------------------- cache

CacheFormat = Literal["bf16", "fp8"]


def cache_bytes_per_token(config: DeepseekConfig, cache: CacheFormat = "bf16", num_layers: int | None = None) -> int:
    """Bytes that one token takes in the latent cache, over `num_layers` layers (all of the main model by default).

    A bf16 row is `2 (kv_lora_rank + qk_rope_head_dim)` bytes; an FP8 row has one byte per latent number, a float32
    scale per 128 of them, and the rotated key in bf16: 1152 and 656 bytes in every release.
    """
    if cache == "bf16":
        row = 2 * config.latent_dim
    else:
        row = config.kv_lora_rank + 4 * ceil_div(config.kv_lora_rank, 128) + 2 * config.qk_rope_head_dim
    return row * (config.num_hidden_layers if num_layers is None else num_layers)


@dataclass(frozen=True)
class CacheSizes:
    """Bytes of cache per token, and what other attention of the same depth and head size would take in bf16."""

    bf16: int
    fp8: int
    mha: int
    """Multi-head: a key and a value of `v_head_dim` for every head."""
    expanded: int
    """MLA with its keys and values expanded: `qk_head_dim + v_head_dim` for every head."""
    gqa8: int
    """Grouped-query attention with 8 key-value heads of `v_head_dim`."""


def cache_sizes(config: DeepseekConfig) -> CacheSizes:
    """Compares a token's latent cache with what other kinds of attention keep."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    return CacheSizes(
        bf16=cache_bytes_per_token(config, "bf16"),
        fp8=cache_bytes_per_token(config, "fp8"),
        mha=layers * heads * 2 * config.v_head_dim * 2,
        expanded=layers * heads * (config.qk_head_dim + config.v_head_dim) * 2,
        gqa8=layers * 8 * 2 * config.v_head_dim * 2,
    )


# ---------------------------------------------------------------------------------------------------------------- fit


@dataclass(frozen=True)
class Fit:
    """What fits into some memory."""

    weight_bytes: int
    """Of the whole main model."""
    num_layers: int
    """How many of the first layers fit, with room for a page of cache."""
    is_whole: bool
    """Whether that is all of them."""
    context: int
    """Tokens of cache, over all requests, that fit beside those layers. One request ends at
    `max_position_embeddings`."""


def fit(
    config: DeepseekConfig,
    free_bytes: int,
    *,
    checkpoint: Checkpoint | None = None,
    cache: CacheFormat = "bf16",
    reserve_bytes: int = RESERVE_BYTES,
) -> Fit:
    """What of a model fits into `free_bytes`, of which `reserve_bytes` stay free.

    Args:
        checkpoint: take the weights' dtypes from its headers; otherwise they are the config's.
    """
    page = 64
    outside, layers = weight_bytes_by_layer(config, checkpoint)
    left = free_bytes - reserve_bytes - outside
    num_layers = 0
    for layer_bytes in layers:
        if left - layer_bytes < page * cache_bytes_per_token(config, cache, num_layers + 1):
            break
        left -= layer_bytes
        num_layers += 1
    per_token = cache_bytes_per_token(config, cache, num_layers)
    context = left // (page * per_token) * page if num_layers else 0
    return Fit(outside + sum(layers), num_layers, num_layers == len(layers), context)
