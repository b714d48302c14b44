"""A DeepSeek-V2 or -V3 model's `config.json` as a closed, checked dataclass.

Two dialects exist and both are read: released files carry `rope_scaling`, `rope_theta` and `torch_dtype`; files that
transformers 5 saved carry `rope_parameters` (with `rope_theta` inside) and `dtype`. A key that no formula here needs
is ignored; a value that would change a formula and is not supported is refused by name. Every size is bounded, so
that a hostile file is refused before anything is allocated for it.

Source: DeepSeek-V2 report (arXiv:2405.04434) and DeepSeek-V3 report (arXiv:2412.19437), hyper-parameters.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import torch

from deepseek_ops.numeric import BLOCK
from deepseek_ops.rope import YarnScaling

__all__ = [
    "RELEASED",
    "CheckpointError",
    "ConfigError",
    "DeepseekConfig",
    "Fp8Quantization",
    "YarnScaling",
    "read_json",
]

Dialect = Literal["released", "transformers5"]

MODEL_TYPES: Final = ("deepseek_v2", "deepseek_v3")
DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_CONFIG_BYTES: Final = 1 << 20
MAX_CONFIG_CONTAINERS: Final = 1000
MAX_MOE_MODULES: Final = 65536
"""Bound on layers x experts, so that the list of expected tensors stays small whatever a config claims."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or must not be. Subclasses, here and in `checkpoint.py`, say what is wrong."""


class ConfigError(CheckpointError):
    """A config that cannot be read, contradicts itself or asks for what is not supported."""


@dataclass(frozen=True)
class Fp8Quantization:
    """Block FP8 weights, as in the V3 release: e4m3 with one float32 scale per 128 x 128 block."""

    weight_block_size: tuple[int, int] = (BLOCK, BLOCK)
    scale_fmt: str | None = None
    """None: any float32 scale. "ue8m0": powers of two, for weights and activations (V3.1 on)."""


@dataclass(frozen=True)
class DeepseekConfig:
    """The architecture of one model; fields carry the names of the checkpoint's `config.json`.

    Raises:
        ConfigError: a value is out of range or not supported; the message names key, wanted and got.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the dense layers' MLP."""
    moe_intermediate_size: int
    """Width of one routed expert; the shared experts are one MLP of `n_shared_experts` times it."""
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int | None
    """None: every layer is dense."""
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    topk_method: str
    """"greedy" or "group_limited_greedy" (V2), "noaux_tc" (V3)."""
    scoring_func: str
    """"softmax" (V2) or "sigmoid" (V3)."""
    norm_topk_prob: bool
    routed_scaling_factor: float
    first_k_dense_replace: int
    """The first so many layers have a dense MLP instead of experts."""
    q_lora_rank: int | None
    """None: one query projection (V2-Lite)."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: YarnScaling | None
    rms_norm_eps: float = 1e-6
    rope_interleave: bool = True
    """True: RoPE turns the pairs (0, 1), (2, 3), ...; False: (i, i + half)."""
    num_nextn_predict_layers: int = 0
    """Multi-token prediction modules beside the main model."""
    tie_word_embeddings: bool = False
    torch_dtype: str = "bfloat16"
    quantization: Fp8Quantization | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check(self)

    # ------------------------------------------------------------------------------------------- derived values

    @property
    def dtype(self) -> torch.dtype:
        """What the weights that are not quantized are computed in."""
        return DTYPES[self.torch_dtype]

    @property
    def family(self) -> str:
        """ "V2-Lite", "V2", "V3" or "V3.1", by structure: R1 is a V3, V2.5 a V2, V3.1 a V3 with UE8M0 scales."""
        if self.model_type == "deepseek_v2":
            return "V2-Lite" if self.q_lora_rank is None else "V2"
        return "V3.1" if self.quantization and self.quantization.scale_fmt == "ue8m0" else "V3"

    @property
    def qk_head_dim(self) -> int:
        """A query's or an expanded key's width: `qk_nope_head_dim + qk_rope_head_dim`."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """What the cache holds per token and layer: `kv_lora_rank + qk_rope_head_dim` (576 in every release)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """`qk_head_dim ** -0.5 * m ** 2` with YaRN's `m = 0.1 * mscale_all_dim * ln(factor) + 1` (V2 report, 3.1.4)."""
        scale = self.qk_head_dim**-0.5
        return scale * self.rope_scaling.softmax_scale_factor() if self.rope_scaling else scale

    @property
    def has_experts(self) -> bool:
        return self.n_routed_experts is not None and self.first_k_dense_replace < self.num_hidden_layers

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple, whichever form the file has."""
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else eos

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` has experts. MTP layers, counted on from `num_hidden_layers`, always do."""
        return self.n_routed_experts is not None and layer_idx >= self.first_k_dense_replace

    def first_layers(self, num_layers: int) -> DeepseekConfig:
        """The same model cut off after its first `num_layers` layers, without MTP."""
        num_layers = min(num_layers, self.num_hidden_layers)
        mtp = self.num_nextn_predict_layers if num_layers == self.num_hidden_layers else 0
        return replace(self, num_hidden_layers=num_layers, num_nextn_predict_layers=mtp)

    # ------------------------------------------------------------------------------------------ reading, writing

    @classmethod
    def from_json(cls, source: str | os.PathLike[str] | dict[str, Any]) -> DeepseekConfig:
        """Reads `config.json` (a file, the folder that holds it, or its parsed content) in either dialect.

        Raises:
            ConfigError: the file is not plain JSON, or a value is out of range or not supported.
            OSError: the file cannot be opened.
        """
        if isinstance(source, dict):
            return _parse(source)
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        try:
            return _parse(read_json(path, MAX_CONFIG_BYTES, MAX_CONFIG_CONTAINERS))
        except ConfigError as error:
            raise ConfigError(f"{path.name}: {error}") from None

    def to_dict(self, dialect: Dialect = "released") -> dict[str, Any]:
        """What `config.json` says, as the releases ("released") or as transformers 5 write it ("transformers5")."""
        return _to_dict(self, dialect)


# ---------------------------------------------------------------------------------------------------------- checks


def _check(c: DeepseekConfig) -> None:
    _one_of("model_type", c.model_type, MODEL_TYPES)
    is_v3 = c.model_type == "deepseek_v3"
    _one_of("topk_method", c.topk_method, ("noaux_tc",) if is_v3 else ("greedy", "group_limited_greedy"))
    _one_of("scoring_func", c.scoring_func, ("sigmoid",) if is_v3 else ("softmax",))
    _one_of("torch_dtype", c.torch_dtype, tuple(DTYPES))

    _integer("vocab_size", c.vocab_size, 1, 1 << 22)
    _integer("hidden_size", c.hidden_size, 1, 1 << 17)
    _integer("intermediate_size", c.intermediate_size, 1, 1 << 20)
    _integer("moe_intermediate_size", c.moe_intermediate_size, 1, 1 << 20)
    _integer("num_hidden_layers", c.num_hidden_layers, 1, 1024)
    _integer("num_attention_heads", c.num_attention_heads, 1, 1024)
    _integer("first_k_dense_replace", c.first_k_dense_replace, 0, 1024)
    _integer("num_nextn_predict_layers", c.num_nextn_predict_layers, 0, 8)
    _integer("kv_lora_rank", c.kv_lora_rank, 1, 1 << 16)
    if c.q_lora_rank is not None:
        _integer("q_lora_rank", c.q_lora_rank, 1, 1 << 16)
    _integer("qk_nope_head_dim", c.qk_nope_head_dim, 1, 1 << 12)
    _integer("qk_rope_head_dim", c.qk_rope_head_dim, 2, 1 << 12)
    _true(c.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "even", c.qk_rope_head_dim)
    _integer("v_head_dim", c.v_head_dim, 1, 1 << 12)
    _integer("max_position_embeddings", c.max_position_embeddings, 1, 1 << 30)

    if c.n_routed_experts is not None:
        _integer("n_routed_experts", c.n_routed_experts, 1, 4096)
        modules = c.n_routed_experts * (c.num_hidden_layers + c.num_nextn_predict_layers)
        _true(modules <= MAX_MOE_MODULES, "n_routed_experts x layers", f"at most {MAX_MOE_MODULES}", modules)
        _integer("num_experts_per_tok", c.num_experts_per_tok, 1, c.n_routed_experts)
        _integer("n_group", c.n_group, 1, c.n_routed_experts)
        _true(c.n_routed_experts % c.n_group == 0, "n_group", f"a divisor of {c.n_routed_experts} experts", c.n_group)
        _integer("topk_group", c.topk_group, 1, c.n_group)
        reachable = c.topk_group * (c.n_routed_experts // c.n_group)
        limit = f"at most the {reachable} experts of topk_group = {c.topk_group} groups"
        _true(c.num_experts_per_tok <= reachable, "num_experts_per_tok", limit, c.num_experts_per_tok)
        if is_v3:
            least = "such that a group holds at least two experts"  # a group's score is the sum of its two best
            _true(c.n_routed_experts // c.n_group >= 2, "n_group", least, c.n_group)
    _integer("n_shared_experts", c.n_shared_experts, 0, 64)

    _number("routed_scaling_factor", c.routed_scaling_factor, 1e-6, 1e6)
    _number("rms_norm_eps", c.rms_norm_eps, 1e-20, 0.1)
    _number("rope_theta", c.rope_theta, 1.0, 1e12)
    for key in ("norm_topk_prob", "rope_interleave", "tie_word_embeddings"):
        _true(isinstance(getattr(c, key), bool), key, "true or false", getattr(c, key))
    if c.quantization:
        block = tuple(c.quantization.weight_block_size)
        _true(block == (BLOCK, BLOCK), "quantization_config.weight_block_size", [BLOCK, BLOCK], list(block))
        _one_of("quantization_config.scale_fmt", c.quantization.scale_fmt, (None, "ue8m0"))
    for key, tokens in (("bos_token_id", [c.bos_token_id]), ("eos_token_id", list(c.stop_token_ids))):
        for token in tokens:
            if token is not None:
                _integer(key, token, 0, c.vocab_size - 1)


def _true(holds: bool, key: str, wanted: Any, got: Any) -> None:
    if not holds:
        raise ConfigError(f"{key} must be {wanted}, got {_short(got)}")


def _one_of(key: str, got: Any, wanted: tuple[Any, ...]) -> None:
    _true(got in wanted, key, " or ".join("null" if w is None else str(w) for w in wanted), got)


def _integer(key: str, got: Any, low: int, high: int) -> None:
    is_integer = isinstance(got, int) and not isinstance(got, bool)
    _true(is_integer and low <= got <= high, key, f"an integer from {low} to {high}", got)


def _number(key: str, got: Any, low: float, high: float) -> None:
    is_number = isinstance(got, (int, float)) and not isinstance(got, bool)
    _true(is_number and low <= got <= high, key, f"a number from {low:g} to {high:g}", got)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --------------------------------------------------------------------------------------------------------- parsing

_FAMILY_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "deepseek_v2": {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "moe_intermediate_size": 1407,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
        "max_position_embeddings": 2048,
        "num_nextn_predict_layers": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "deepseek_v3": {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "max_position_embeddings": 4096,
        "num_nextn_predict_layers": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}
"""What a missing key means: the documented defaults of the two Hugging Face configuration classes."""

_SHARED_DEFAULTS: Final[dict[str, Any]] = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_interleave": True,
    "tie_word_embeddings": False,
}

_NULL_MEANS: Final[dict[str, Any]] = {"n_group": 1, "topk_group": 1, "n_shared_experts": 0, "rope_interleave": True}
"""Keys that releases or transformers write as null, and what that stands for."""

_YARN_RANGES: Final[dict[str, tuple[float, float]]] = {
    "factor": (1.0, 1e6),
    "beta_fast": (1e-6, 1e9),
    "beta_slow": (1e-6, 1e9),
    "mscale": (0.0, 1e3),
    "mscale_all_dim": (0.0, 1e3),
}

_OTHER_NAMES: Final = {"num_nextn_predict_layers": "num_mtp_layers"}


def _parse(raw: dict[str, Any]) -> DeepseekConfig:
    model_type = raw.get("model_type")
    if model_type == "deepseek_v32":
        raise ConfigError("model_type deepseek_v32 (DeepSeek-V3.2, sparse attention) is not supported yet")
    _one_of("model_type", model_type, MODEL_TYPES)
    _refuse_unsupported(raw)

    fields: dict[str, Any] = {"model_type": model_type}
    for key, default in (_SHARED_DEFAULTS | _FAMILY_DEFAULTS[str(model_type)]).items():
        value = raw.get(key, raw.get(_OTHER_NAMES.get(key, key), default))
        fields[key] = _NULL_MEANS.get(key) if value is None else value
    if fields["q_lora_rank"] == 0:  # DeepSeek's own inference configs write 0 for "none"
        fields["q_lora_rank"] = None
    if fields["n_routed_experts"] is None:
        fields["num_experts_per_tok"] = fields["num_experts_per_tok"] or 1
    if isinstance(fields["eos_token_id"], list):
        fields["eos_token_id"] = tuple(fields["eos_token_id"])

    rope = _table(raw, "rope_parameters") or _table(raw, "rope_scaling") or {}
    fields["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    fields["rope_scaling"] = _parse_yarn(rope)
    torch_dtype = raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"
    fields["torch_dtype"] = torch_dtype.removeprefix("torch.") if isinstance(torch_dtype, str) else torch_dtype
    fields["quantization"] = _parse_quantization(_table(raw, "quantization_config"))
    return DeepseekConfig(**fields)


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    heads = raw.get("num_attention_heads", _FAMILY_DEFAULTS[str(raw["model_type"])]["num_attention_heads"])
    for key, wanted in (
        ("attention_bias", (False, None)),
        ("mlp_bias", (False, None)),
        ("hidden_act", ("silu", None)),
        ("moe_layer_freq", (1, None)),
        ("num_key_value_heads", (heads, None)),
    ):
        if key in raw and raw[key] not in wanted:
            only = json.dumps(wanted[0])
            raise ConfigError(f"{key} must be {only}, got {_short(raw[key])}: anything else is unsupported")


def _table(raw: dict[str, Any], key: str) -> dict[str, Any] | None:
    value = raw.get(key)
    _true(value is None or isinstance(value, dict), key, "an object or null", value)
    return value


def _parse_yarn(rope: dict[str, Any]) -> YarnScaling | None:
    kind = rope.get("rope_type", rope.get("type"))
    _one_of("rope_scaling.type", kind, ("yarn", "default", None))
    if kind != "yarn":
        return None
    for key in ("attention_factor", "truncate"):
        if rope.get(key) not in (None, True):
            raise ConfigError(f"rope_scaling.{key} must be absent, got {_short(rope[key])}: it is unsupported")
    _true("factor" in rope, "rope_scaling.factor", "given", None)
    original = rope.get("original_max_position_embeddings", 4096)
    _integer("rope_scaling.original_max_position_embeddings", original, 1, 1 << 30)
    given = {key: rope[key] for key in _YARN_RANGES if rope.get(key) is not None}
    for key, value in given.items():
        _number(f"rope_scaling.{key}", value, *_YARN_RANGES[key])
    try:
        return YarnScaling(original_max_position_embeddings=original, **given)
    except ValueError as error:
        raise ConfigError(f"rope_scaling: {error}") from None


def _parse_quantization(raw: dict[str, Any] | None) -> Fp8Quantization | None:
    if raw is None:
        return None
    _one_of("quantization_config.quant_method", raw.get("quant_method"), ("fp8",))
    _one_of("quantization_config.fmt", raw.get("fmt", "e4m3"), ("e4m3",))
    _one_of("quantization_config.activation_scheme", raw.get("activation_scheme", "dynamic"), ("dynamic",))
    block = raw.get("weight_block_size")
    _true(block == [BLOCK, BLOCK], "quantization_config.weight_block_size", [BLOCK, BLOCK], block)
    return Fp8Quantization((BLOCK, BLOCK), raw.get("scale_fmt"))


# --------------------------------------------------------------------------------------------------------- writing


def _to_dict(c: DeepseekConfig, dialect: Dialect) -> dict[str, Any]:
    is_v3 = c.model_type == "deepseek_v3"
    out: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "model_type": c.model_type,
    }
    plain = [
        *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group"),
        *("topk_group", "topk_method", "scoring_func", "norm_topk_prob", "routed_scaling_factor"),
        *("first_k_dense_replace", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
        *("v_head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id"),
    ]
    out |= {key: getattr(c, key) for key in plain}
    out["eos_token_id"] = list(c.eos_token_id) if isinstance(c.eos_token_id, tuple) else c.eos_token_id
    out |= {
        "num_key_value_heads": c.num_attention_heads,
        "num_nextn_predict_layers": c.num_nextn_predict_layers,
        "hidden_act": "silu",
        "attention_bias": False,
        "moe_layer_freq": 1,
    }
    if not c.rope_interleave or dialect == "transformers5":  # releases leave the default away
        out["rope_interleave"] = c.rope_interleave

    yarn = None
    if c.rope_scaling is not None:
        yarn = {key: value for key, value in asdict(c.rope_scaling).items() if value is not None}
    if dialect == "released":
        out["rope_theta"] = c.rope_theta
        out["rope_scaling"] = None if yarn is None else {"type": "yarn"} | yarn
        out["torch_dtype"] = c.torch_dtype
    else:
        out["rope_parameters"] = {"rope_type": "yarn" if yarn else "default", "rope_theta": c.rope_theta} | (yarn or {})
        out["dtype"] = c.torch_dtype
    if c.quantization:
        out["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(c.quantization.weight_block_size),
        }
        if c.quantization.scale_fmt:
            out["quantization_config"]["scale_fmt"] = c.quantization.scale_fmt
    return out


# ----------------------------------------------------------------------------------------------------------- JSON


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file for reading that must be a regular one: no FIFO to wait at, no device to read for ever.

    Raises:
        ConfigError: it is something else.
        OSError: it cannot be opened.
    """
    _true(stat.S_ISREG(os.stat(path).st_mode), "the file", "a regular file", "something else")
    stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):  # swapped in between
        stream.close()
        raise ConfigError("the file must be a regular file, got something else")
    return stream


def read_json(path: str | os.PathLike[str], max_bytes: int, max_containers: int) -> dict[str, Any]:
    """Reads a JSON object from a file that may be hostile.

    Raises:
        ConfigError: not a regular file, over `max_bytes`, or as `parse_json`.
        OSError: the file cannot be opened.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        _true(size <= max_bytes, "the file", f"at most {max_bytes} bytes", size)
        return parse_json(stream.read(max_bytes), max_containers)


def parse_json(data: bytes, max_containers: int) -> dict[str, Any]:
    """A JSON object of at most `max_containers` objects and arrays, which bounds both its depth and its memory.

    Raises:
        ConfigError: not UTF-8, not JSON, too many or too deep containers, a key given twice, or not an object.
    """
    containers = data.count(b"{") + data.count(b"[")
    _true(containers <= max_containers, "the JSON", f"of at most {max_containers} objects and arrays", containers)
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_int=_bounded_int)
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text") from None
    except RecursionError:
        raise ConfigError("nested too deep") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"not valid JSON: {error.msg} at line {error.lineno}") from None
    _true(isinstance(value, dict), "the content", "a JSON object", type(value).__name__)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ConfigError(f"the key {_short(key)} is given twice")
        table[key] = value
    return table


def _no_constant(name: str) -> None:
    raise ConfigError(f"not valid JSON: {name}")


def _bounded_int(digits: str) -> int:
    if len(digits) > 20:  # Python itself would raise a bare ValueError only at 4300
        raise ConfigError(f"an integer of {len(digits)} digits")
    return int(digits)


# -------------------------------------------------------------------------------------------------------- releases


def _released(model_type: str, mscale: float, **fields: Any) -> DeepseekConfig:
    yarn = YarnScaling(
        factor=40.0,
        original_max_position_embeddings=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=mscale,
        mscale_all_dim=mscale,
    )
    defaults = _SHARED_DEFAULTS | _FAMILY_DEFAULTS[model_type]
    common = {"model_type": model_type, "max_position_embeddings": 163840, "rope_theta": 10000.0, "rope_scaling": yarn}
    return DeepseekConfig(**(defaults | common | fields))


_V2_COMMON: Final[dict[str, Any]] = {"first_k_dense_replace": 1, "bos_token_id": 100000, "eos_token_id": 100001}
_V2: Final[dict[str, Any]] = _V2_COMMON | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "n_routed_experts": 160,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
}
_V2_LITE: Final[dict[str, Any]] = _V2_COMMON | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
}

RELEASED: Final[dict[str, DeepseekConfig]] = {
    "v2-lite": _released("deepseek_v2", 0.707, **_V2_LITE),
    "v2": _released("deepseek_v2", 0.707, **_V2),
    "v2.5": _released("deepseek_v2", 1.0, **_V2),
    "v3": _released("deepseek_v3", 1.0, quantization=Fp8Quantization()),
    "v3.1": _released("deepseek_v3", 1.0, quantization=Fp8Quantization(scale_fmt="ue8m0")),
}
"""The configurations of the released models. R1, R1-0528 and V3-0324 are "v3"."""
