"""Toy checkpoints: of the right family, readable by transformers, and with weights that let every part matter."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_ops.model.checkpoint import Checkpoint
from deepseek_ops.model.config import RELEASED
from deepseek_ops.model.tiny import FAMILIES, random_weights, tiny_config, write_tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_features_of_its_release(family: str) -> None:
    tiny, real = tiny_config(family), RELEASED["v3" if family == "r1" else family]
    assert tiny.family == real.family
    for name in ("model_type", "topk_method", "scoring_func", "norm_topk_prob", "n_shared_experts", "quantization"):
        assert getattr(tiny, name) == getattr(real, name), name
    for name in ("q_lora_rank", "rope_scaling", "num_nextn_predict_layers", "first_k_dense_replace"):
        assert bool(getattr(tiny, name)) == bool(getattr(real, name)), name
    assert (tiny.n_group > 1) == (real.n_group > 1)
    assert tiny.rope_scaling is not None
    assert real.rope_scaling is not None
    assert tiny.rope_scaling.mscale_all_dim == real.rope_scaling.mscale_all_dim


def test_real_mla_has_the_sizes_that_kernels_are_made_for() -> None:
    config = tiny_config("v2-lite", real_mla=True)
    sizes = (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim)
    assert sizes == (512, 64, 128, 128)
    assert config.q_lora_rank is None


def test_options_are_taken_and_unknown_ones_refused() -> None:
    config = tiny_config("v2", fp8=True, yarn=False, n_group=2, tie_word_embeddings=True, rope_interleave=False)
    assert config.quantization is not None
    assert (config.rope_scaling, config.n_group, config.tie_word_embeddings) == (None, 2, True)
    assert tiny_config("v3.1", fp8=False).quantization is None
    with pytest.raises(ValueError, match=r"family must be one of .*, got 'v9'"):
        tiny_config("v9")
    with pytest.raises(TypeError, match="window_size"):
        tiny_config("v3", window_size=3)


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    config = tiny_config("v3", num_hidden_layers=1)
    first, again, other = (dict(random_weights(config, seed)) for seed in (1, 1, 2))
    for name, tensor in first.items():
        assert torch.equal(tensor.view(torch.uint8), again[name].view(torch.uint8)), name
        if not name.endswith("scale_inv"):
            assert not torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def test_ue8m0_scales_are_powers_of_two() -> None:
    scales = [x for name, x in random_weights(tiny_config("v3.1")) if name.endswith("_scale_inv")]
    assert scales
    assert all(torch.equal(torch.frexp(x).mantissa, torch.full_like(x, 0.5)) for x in scales)


@pytest.mark.parametrize("family", ["v2-lite", "v2", "v3"])
def test_transformers_runs_it_and_every_part_matters(family: str, tmp_path: Path, caplog: Any) -> None:
    config = write_tiny(tmp_path, family, fp8=False, torch_dtype="float32", num_shards=2)
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    assert "newly initialized" not in caplog.text
    tokens = torch.randint(0, 256, (1, 64))
    with torch.no_grad():
        out = model(tokens, output_attentions=True, output_hidden_states=True)
    for hidden in out.hidden_states:
        rms = hidden.square().mean(-1).sqrt()
        assert rms.min() > 0.3
        assert rms.max() < 20
    for attention in out.attentions:  # [1, heads, 64, 64]
        # Of 64 keys equally liked each would get 1/64; here the best ones get far more, but not all.
        best = attention[0, :, -1].amax(-1)
        assert best.min() > 3 / 64
        assert best.median() < 0.9
    assert out.logits.std() > 1.5
    chosen = out.logits[0].argmax(-1).unique().numel()
    assert chosen > 16, "the same few tokens at all positions"
    assert config.vocab_size == out.logits.shape[-1]


@pytest.mark.parametrize("family", ["v2-lite", "v2", "v3"])
def test_what_transformers_saves_of_it_is_a_checkpoint_again(family: str, tmp_path: Path) -> None:
    config = write_tiny(tmp_path / "ours", family, fp8=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="1MB")
    checkpoint = Checkpoint(tmp_path / "theirs")
    assert checkpoint.config == config
    ours = dict(Checkpoint(tmp_path / "ours").stream())
    assert len({info.file for info in checkpoint.tensors.values()}) > 1
    for name, tensor in checkpoint.stream():
        assert torch.equal(tensor.float(), ours[name].float()), name
