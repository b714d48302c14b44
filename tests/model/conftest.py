"""Small random checkpoints of every variant, in Hugging Face names, for our model and for transformers alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_ops import YarnScaling
from deepseek_ops.model.checkpoint import write_checkpoint
from deepseek_ops.model.config import DeepseekConfig, Fp8Quantization
from deepseek_ops.model.tiny import random_weights

_SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 112,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rope_scaling": YarnScaling(
        factor=40.0, original_max_position_embeddings=64, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
    ),
    "torch_dtype": "float32",
}
V2 = DeepseekConfig(
    model_type="deepseek_v2",
    n_group=4,
    topk_group=2,
    topk_method="group_limited_greedy",
    scoring_func="softmax",
    norm_topk_prob=False,
    routed_scaling_factor=4.0,
    **_SIZES,
)
V3 = DeepseekConfig(
    model_type="deepseek_v3",
    n_group=4,
    topk_group=2,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    **_SIZES,
)
YARN = _SIZES["rope_scaling"]

VARIANTS: dict[str, DeepseekConfig] = {
    "V2-Lite": replace(
        V2,
        q_lora_rank=None,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
        n_shared_experts=2,
        rope_scaling=replace(YARN, mscale=0.707, mscale_all_dim=0.707),
    ),
    "V2": replace(V2, n_shared_experts=2, rope_scaling=replace(YARN, mscale=0.707, mscale_all_dim=0.707)),
    "V2 without YaRN, all layers with experts": replace(V2, rope_scaling=None, first_k_dense_replace=0),
    "V3": V3,
    "V3 with MTP, two dense layers": replace(V3, num_nextn_predict_layers=1, first_k_dense_replace=2),
    "V3 with half-split RoPE, without YaRN": replace(V3, rope_interleave=False, rope_scaling=None),
    "V3 with half-split RoPE and YaRN": replace(V3, rope_interleave=False),
    "V3 with tied embeddings, all layers with experts": replace(V3, tie_word_embeddings=True, first_k_dense_replace=0),
    "V3 with unequal mscales": replace(V3, rope_scaling=replace(YARN, mscale=1.0, mscale_all_dim=0.707)),
    "V3 with YaRN's mscales left away": replace(V3, rope_scaling=replace(YARN, mscale=1.0, mscale_all_dim=0.0)),
    "V3 without q_lora, two shared experts": replace(V3, q_lora_rank=None, n_shared_experts=2),
    "V3 without experts": replace(V3, first_k_dense_replace=3),
    "V3 without norm_topk_prob, other eps": replace(V3, norm_topk_prob=False, rms_norm_eps=1e-3),
}

FP8 = replace(
    V3,
    hidden_size=256,
    intermediate_size=192,
    moe_intermediate_size=128,
    n_routed_experts=8,
    num_hidden_layers=2,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    quantization=Fp8Quantization(),
    num_nextn_predict_layers=1,
)
"""With the ragged cases of the releases: kv_a of 192 rows, one and a half blocks, and such a dense MLP."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only wait for a second thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[DeepseekConfig], Path]:
    """The folder of a random checkpoint of a config; each is written once."""
    folders: dict[DeepseekConfig, Path] = {}

    def folder_of(config: DeepseekConfig) -> Path:
        if config not in folders:
            folder = tmp_path_factory.mktemp("model")
            write_checkpoint(folder, config.to_dict(), [dict(random_weights(config))], 1)
            folders[config] = folder
        return folders[config]

    return folder_of
