"""Toy checkpoints of each family: random weights with everything that the family has, written in the release's format.

They stand in for the real ones in tests and first tries: no download, a second to make, a megabyte or a few. The
weights are scaled so that every part matters: with unit-variance signals throughout, attention prefers some keys,
the router some experts, and a formula that is wrong anywhere changes the logits visibly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from deepseek_ops.numeric import ceil_div
from deepseek_ops.quantize import per_block_cast_to_fp8

from .checkpoint import SCALE_SUFFIX, expected_tensors, write_checkpoint
from .config import DeepseekConfig, Fp8Quantization, YarnScaling

__all__ = ["FAMILIES", "random_weights", "tiny_config", "write_tiny"]

_YARN: Final = YarnScaling(
    factor=8.0, original_max_position_embeddings=128, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
)

_COMMON: Final[dict[str, Any]] = {
    "vocab_size": 272,  # the 256 bytes and a few special tokens
    "hidden_size": 256,
    "intermediate_size": 320,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rope_scaling": _YARN,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
_V2: Final[dict[str, Any]] = _COMMON | {
    "model_type": "deepseek_v2",
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 2.0,
    "rope_scaling": replace(_YARN, mscale=0.707, mscale_all_dim=0.707),
}
_V2_LITE: Final[dict[str, Any]] = _V2 | {
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
}
_V3: Final[dict[str, Any]] = _COMMON | {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "quantization": Fp8Quantization(),
}

FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "v2-lite": _V2_LITE,
    "v2": _V2,
    "v3": _V3,
    "r1": _V3,
    "v3.1": _V3 | {"quantization": Fp8Quantization(scale_fmt="ue8m0")},
}
"""The fields of each family's toy configuration."""

_REAL_MLA: Final[dict[str, Any]] = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "q_lora_rank": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
}
"""The releases' head and latent sizes, which the GPU kernels are compiled for."""


def tiny_config(
    family: str = "v3", *, real_mla: bool = False, fp8: bool | None = None, yarn: bool = True, **fields: Any
) -> DeepseekConfig:
    """A toy configuration with the features of `family` ("v2-lite", "v2", "v3", "r1" or "v3.1").

    Args:
        real_mla: take the releases' head and latent sizes (512, 128 + 64, 128) instead of toy ones.
        fp8: FP8 or floating-point weights; by default what the family was released in.
        yarn: False leaves RoPE unscaled.
        fields: fields of `DeepseekConfig` to set, such as `num_hidden_layers`, `q_lora_rank`, `n_group`,
            `num_nextn_predict_layers`, `rope_interleave`, `tie_word_embeddings` or `torch_dtype`.

    Raises:
        ValueError: an unknown family, or fields that do not fit.
        TypeError: an unknown field.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    base = dict(FAMILIES[family])
    if real_mla:
        base |= _REAL_MLA | ({"q_lora_rank": None} if base["q_lora_rank"] is None else {})
    if fp8 is not None:
        base["quantization"] = (base.get("quantization") or Fp8Quantization()) if fp8 else None
    if not yarn:
        base["rope_scaling"] = None
    return DeepseekConfig(**(base | fields))


def random_weights(config: DeepseekConfig, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint of `config`, by name: same seed, same values."""
    generator = torch.Generator().manual_seed(seed)
    copies: dict[str, Tensor] = {}
    for name, spec in expected_tensors(config).items():
        if name.endswith(SCALE_SUFFIX) or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if spec.part in ("embedding", "head") and spec.layer_idx is not None:  # an MTP layer's copy
            original = "model.embed_tokens.weight" if spec.part == "embedding" else "lm_head.weight"
            yield name, copies.get(original, copies["model.embed_tokens.weight"]).clone()
            continue
        x = torch.randn(spec.shape, generator=generator)
        if len(spec.shape) == 2 and spec.part != "embedding":
            x *= (3.0 if spec.part == "head" else 1.0) * spec.shape[1] ** -0.5
        elif name.endswith("norm.weight"):
            x = 1 + 0.2 * x
        elif name.endswith("e_score_correction_bias"):
            yield name, 0.2 * x
            continue
        if spec.dtypes[0] is torch.float8_e4m3fn:
            use_ue8m0 = config.quantization is not None and config.quantization.scale_fmt == "ue8m0"
            weight, scale = per_block_cast_to_fp8(x, use_ue8m0=use_ue8m0)
            yield name, weight
            yield name + SCALE_SUFFIX, scale
            continue
        x = x.to(config.dtype)
        if spec.part in ("embedding", "head"):
            copies[name] = x
        yield name, x


def write_tiny(
    folder: str | os.PathLike[str], family: str = "v3", *, seed: int = 0, num_shards: int = 1, **options: Any
) -> DeepseekConfig:
    """Writes a toy checkpoint without a tokenizer (token ids below 256 are bytes).

    Args:
        folder: made if it is not there; must be empty.
        family: and `options`: as `tiny_config`.
        seed: of the weights.
        num_shards: number of safetensors files; more than one come with an index.

    Returns:
        The configuration written.

    Raises:
        FileExistsError: the folder is not empty.
    """
    config = tiny_config(family, **options)
    weights = list(random_weights(config, seed))
    per_shard = ceil_div(len(weights), num_shards)
    shards = [dict(weights[i : i + per_shard]) for i in range(0, len(weights), per_shard)]
    write_checkpoint(folder, config.to_dict(), shards, len(shards))
    return config
