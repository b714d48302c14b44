"""config.json: both dialects, the releases' figures, and everything that must be refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from deepseek_ops.model.config import RELEASED, ConfigError, DeepseekConfig, Fp8Quantization, YarnScaling
from deepseek_ops.model.tiny import FAMILIES, tiny_config

CONFIGS = (
    RELEASED
    | {f"tiny {family}": tiny_config(family) for family in FAMILIES}
    | {
        "no yarn": tiny_config("v3", yarn=False),
        "tied": tiny_config("v3", tie_word_embeddings=True),
        "half-split rope": tiny_config("v3", rope_interleave=False),
        "several ends": tiny_config("v2", eos_token_id=(257, 258)),
        "float32": tiny_config("v2", torch_dtype="float32"),
        "other constants": tiny_config("v3", rope_theta=5e4, rms_norm_eps=1e-5, routed_scaling_factor=1.5),
        "no mtp": tiny_config("v3", num_nextn_predict_layers=0),
        "published yarn": tiny_config("v3", rope_scaling=YarnScaling(4.0, 512)),
    }
)


@pytest.mark.parametrize("dialect", ["released", "transformers5"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_reads_back(name: str, dialect: Any) -> None:
    config = CONFIGS[name]
    assert DeepseekConfig.from_json(json.loads(json.dumps(config.to_dict(dialect)))) == config


@pytest.mark.parametrize("dialect", ["released", "transformers5"])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_survives_being_read_and_saved_by_transformers(name: str, dialect: Any, tmp_path: Path) -> None:
    config = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(dialect)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (theirs.kv_lora_rank, theirs.hidden_size) == (config.kv_lora_rank, config.hidden_size)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    theirs.save_pretrained(tmp_path / "saved")
    assert "rope_parameters" in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert DeepseekConfig.from_json(tmp_path / "saved") == config


def test_the_released_dialect_has_the_keys_of_the_releases() -> None:
    raw = RELEASED["v3.1"].to_dict()
    assert raw["rope_scaling"]["type"] == "yarn"
    assert raw["torch_dtype"] == "bfloat16"
    assert raw["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    }
    assert not {"rope_parameters", "dtype", "rope_interleave"} & raw.keys()
    raw = RELEASED["v2-lite"].to_dict("transformers5")
    assert raw["rope_parameters"]["rope_type"] == "yarn"
    assert not {"rope_scaling", "rope_theta", "torch_dtype"} & raw.keys()


@pytest.mark.parametrize(
    ("name", "family", "scale"),
    [
        ("v2-lite", "V2-Lite", 0.114721),
        ("v2", "V2", 0.114721),
        ("v2.5", "V2", 0.135234),
        ("v3", "V3", 0.135234),
        ("v3.1", "V3.1", 0.135234),
    ],
)
def test_the_releases_have_their_family_and_softmax_scale(name: str, family: str, scale: float) -> None:
    assert RELEASED[name].family == family
    assert RELEASED[name].softmax_scale == pytest.approx(scale, abs=5e-7)
    assert (RELEASED[name].qk_head_dim, RELEASED[name].latent_dim) == (192, 576)


def test_without_mscale_keys_the_softmax_scale_is_not_corrected() -> None:
    raw = RELEASED["v3"].to_dict()
    del raw["rope_scaling"]["mscale"], raw["rope_scaling"]["mscale_all_dim"]
    config = DeepseekConfig.from_json(raw)
    assert config.softmax_scale == 192**-0.5
    assert config.rope_scaling is not None
    assert config.rope_scaling.cos_sin_factor() == pytest.approx(1.368888, abs=5e-7)


def test_dense_layers_come_first_and_then_experts() -> None:
    assert [RELEASED["v3"].is_moe_layer(i) for i in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert [RELEASED["v2-lite"].is_moe_layer(i) for i in (0, 1)] == [False, True]
    dense = tiny_config("v2", n_routed_experts=None)
    assert not any(dense.is_moe_layer(i) for i in range(3))


@pytest.mark.parametrize("eos", [1, [1], [1, 2], None])
def test_stop_tokens_may_be_one_or_several(eos: Any) -> None:
    config = DeepseekConfig.from_json(RELEASED["v3"].to_dict() | {"eos_token_id": eos})
    assert config.stop_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_missing_keys_mean_what_they_mean_to_transformers(model_type: str) -> None:
    raw = {"model_type": model_type, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1}
    config = DeepseekConfig.from_json(raw)
    theirs = AutoConfig.for_model(**raw)
    ours = config.to_dict("transformers5")
    for key in sorted(ours.keys() & theirs.to_dict().keys() - {"architectures", "dtype"}):
        if key != "rope_parameters":
            assert ours[key] == getattr(theirs, key), key


def test_keys_that_no_formula_needs_are_ignored() -> None:
    extra = {"ep_size": 1, "pretraining_tp": 1, "seq_aux": True, "aux_loss_alpha": 0.001, "auto_map": {}, "x": [[1]]}
    assert DeepseekConfig.from_json(RELEASED["v2"].to_dict() | extra) == RELEASED["v2"]


def test_a_model_can_be_cut_off() -> None:
    cut = RELEASED["v3"].first_layers(14)
    assert (cut.num_hidden_layers, cut.num_nextn_predict_layers) == (14, 0)
    assert RELEASED["v3"].first_layers(61) == RELEASED["v3"] == RELEASED["v3"].first_layers(1000)


def test_v32_is_recognised_and_refused() -> None:
    with pytest.raises(ConfigError, match=r"deepseek_v32 .* not supported yet"):
        DeepseekConfig.from_json(RELEASED["v3"].to_dict() | {"model_type": "deepseek_v32"})


YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "model_type must be deepseek_v2 or deepseek_v3, got 'llama'"),
    ({"model_type": None}, "model_type must be"),
    ({"topk_method": "random"}, "topk_method must be noaux_tc, got 'random'"),
    ({"topk_method": "greedy"}, "topk_method must be noaux_tc, got 'greedy'"),
    ({"scoring_func": "softmax"}, "scoring_func must be sigmoid, got 'softmax'"),
    ({"hidden_act": "gelu"}, "hidden_act must be \"silu\", got 'gelu'"),
    ({"attention_bias": True}, "attention_bias must be false, got True"),
    ({"mlp_bias": True}, "mlp_bias must be false"),
    ({"moe_layer_freq": 2}, "moe_layer_freq must be 1, got 2"),
    ({"num_key_value_heads": 8}, "num_key_value_heads must be 128, got 8"),
    ({"torch_dtype": "float64"}, "torch_dtype must be bfloat16 or float16 or float32, got 'float64'"),
    ({"torch_dtype": 5}, "torch_dtype must be"),
    ({"hidden_size": 2**40}, "hidden_size must be an integer from 1 to 131072, got 1099511627776"),
    ({"hidden_size": 0}, "hidden_size must be"),
    ({"hidden_size": 7168.0}, "hidden_size must be an integer"),
    ({"hidden_size": "7168"}, "hidden_size must be an integer"),
    ({"hidden_size": True}, "hidden_size must be an integer"),
    ({"hidden_size": None}, "hidden_size must be an integer"),
    ({"vocab_size": -1}, "vocab_size must be"),
    ({"num_hidden_layers": -3}, "num_hidden_layers must be"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
    ({"n_routed_experts": 10**9}, "n_routed_experts must be"),
    ({"n_routed_experts": 4096, "num_hidden_layers": 1000}, "n_routed_experts x layers must be at most 65536"),
    ({"num_attention_heads": 10**6, "num_key_value_heads": 10**6}, "num_attention_heads must be"),
    ({"kv_lora_rank": None}, "kv_lora_rank must be"),
    ({"q_lora_rank": -1}, "q_lora_rank must be"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim must be even"),
    ({"n_group": 7}, "n_group must be a divisor of 256"),
    ({"n_group": 256, "topk_group": 8}, "n_group must be such that a group holds at least two"),
    ({"topk_group": 9}, "topk_group must be an integer from 1 to 8"),
    ({"num_experts_per_tok": 257}, "num_experts_per_tok must be"),
    ({"num_experts_per_tok": 129}, "num_experts_per_tok must be at most the 128 experts"),
    ({"num_nextn_predict_layers": 100}, "num_nextn_predict_layers must be"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be a number"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
    ({"rope_theta": -1.0}, "rope_theta must be"),
    ({"routed_scaling_factor": None}, "routed_scaling_factor must be"),
    ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
    ({"eos_token_id": 129280}, "eos_token_id must be an integer from 0 to 129279"),
    ({"eos_token_id": [0, "a"]}, "eos_token_id must be"),
    ({"eos_token_id": "a"}, "eos_token_id must be"),
    ({"eos_token_id": {"a": 1}}, "eos_token_id must be"),
    ({"bos_token_id": -1}, "bos_token_id must be"),
    ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
    (
        {"rope_scaling": {"type": "linear", "factor": 2}},
        "rope_scaling.type must be yarn or default or null, got 'linear'",
    ),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor must be given"),
    ({"rope_scaling": YARN | {"factor": "40"}}, "rope_scaling.factor must be a number"),
    ({"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling.factor must be"),
    ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}}, "beta_slow"),
    ({"rope_scaling": YARN | {"mscale": -1}}, "rope_scaling.mscale must be"),
    ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings must be"),
    ({"rope_scaling": YARN | {"attention_factor": 2.0}}, "attention_factor must be absent"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "rope_scaling.type must be"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method must be fp8, got 'awq'"),
    ({"quantization_config": FP8 | {"fmt": "e5m2"}}, "quantization_config.fmt must be e4m3"),
    ({"quantization_config": FP8 | {"activation_scheme": "static"}}, "activation_scheme must be dynamic"),
    ({"quantization_config": FP8 | {"weight_block_size": [1, 128]}}, "weight_block_size must be"),
    ({"quantization_config": FP8 | {"weight_block_size": None}}, "weight_block_size must be"),
    ({"quantization_config": FP8 | {"scale_fmt": "e8"}}, "scale_fmt must be null or ue8m0, got 'e8'"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[re.sub(r"\W+", " ", str(c))[:60] for c, _ in REFUSED])
def test_what_is_not_supported_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        DeepseekConfig.from_json(RELEASED["v3"].to_dict() | change)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"model_type": "deepseek_v3", "model_type": "deepseek_v3"}', "'model_type' is given twice"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "model_type must be"),
        (b"[" * 100_000, "at most 1000 objects and arrays"),
        (b'{"rope_theta": NaN}', "not valid JSON: NaN"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "at most 1048576 bytes"),
    ],
)
def test_a_file_that_is_no_plain_json_object_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        DeepseekConfig.from_json(tmp_path / "config.json")


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="hidden_size"):
        replace(RELEASED["v3"], hidden_size=2**40)
    with pytest.raises(ConfigError, match="weight_block_size"):
        replace(RELEASED["v3"], quantization=Fp8Quantization((64, 128)))
