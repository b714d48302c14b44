"""From a checkpoint's folder to a model: tensors are streamed in one by one and each finds its place by its name.

The model is built without memory, then given memory on its device, then filled; a tensor is converted on the way
(dequantized, quantized or cast) where model and checkpoint differ. So never more exists than the model and the tensor
at hand.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .attention import AttentionForm
from .checkpoint import Checkpoint, mtp_layers
from .config import DeepseekConfig
from .linear import Gemm, Linear
from .moe import Gate
from .mtp import add_mtp
from .transformer import DeepseekModel

__all__ = ["LAYER_MAP", "MTP_MAP", "TOP_MAP", "load_model"]

log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------------- the name map

TOP_MAP: Final = {
    "model.embed_tokens.weight": "embed_tokens",
    "model.norm.weight": "norm",
    "lm_head.weight": "lm_head",
}
"""Outside the layers: the checkpoint's name -> the model's."""

LAYER_MAP: Final = {
    "input_layernorm.weight": "input_layernorm",
    "self_attn.q_proj.weight": "self_attn.qkv_a_proj[0]",
    "self_attn.q_a_proj.weight": "self_attn.qkv_a_proj[0]",
    "self_attn.kv_a_proj_with_mqa.weight": "self_attn.qkv_a_proj[1]",
    "self_attn.q_a_layernorm.weight": "self_attn.q_a_layernorm",
    "self_attn.q_b_proj.weight": "self_attn.q_b_proj[0]",
    "self_attn.kv_a_layernorm.weight": "self_attn.kv_a_layernorm",
    "self_attn.kv_b_proj.weight": "self_attn.kv_b_proj[0]",
    "self_attn.o_proj.weight": "self_attn.o_proj[0]",
    "post_attention_layernorm.weight": "post_attention_layernorm",
    "mlp.gate_proj.weight": "mlp.gate_up_proj[0]",
    "mlp.up_proj.weight": "mlp.gate_up_proj[1]",
    "mlp.down_proj.weight": "mlp.down_proj[0]",
    "mlp.gate.weight": "mlp.gate.weight",
    "mlp.gate.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
    "mlp.experts.*.gate_proj.weight": "mlp.experts.gate_up_proj[0]",
    "mlp.experts.*.up_proj.weight": "mlp.experts.gate_up_proj[1]",
    "mlp.experts.*.down_proj.weight": "mlp.experts.down_proj[0]",
    "mlp.shared_experts.gate_proj.weight": "mlp.shared_experts.gate_up_proj[0]",
    "mlp.shared_experts.up_proj.weight": "mlp.shared_experts.gate_up_proj[1]",
    "mlp.shared_experts.down_proj.weight": "mlp.shared_experts.down_proj[0]",
}
"""Below `model.layers.N.` -> below `layers.N.`. `[i]` is part i of a `Linear`, `*` the expert's place in the stack."""

MTP_MAP: Final = {
    "enorm.weight": "enorm",
    "hnorm.weight": "hnorm",
    "eh_proj.weight": "eh_proj[0]",
    "shared_head.norm.weight": "norm",
    **{theirs: f"block.{ours}" for theirs, ours in LAYER_MAP.items()},
}
"""Below `model.layers.N.` with N from `num_hidden_layers` on -> below `mtp.i.`."""

SCALE_SUFFIX: Final = "_scale_inv"


class Place(NamedTuple):
    """Where a checkpoint's tensor goes."""

    path: str
    """Of the model's module or parameter."""
    part: int | None
    """Of a `Linear`; None for a plain parameter."""
    expert: int | None


def find_place(name: str, config: DeepseekConfig) -> Place | None:
    """The place of the checkpoint's tensor `name` in the model; None if the model has none for it."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if layer is None:
        return Place(TOP_MAP[name], None, None) if name in TOP_MAP else None
    layer_idx, below = int(layer[1]), layer[2]
    expert = re.search(r"(?<=\.experts\.)\d+", below)
    if expert is not None:
        below = below.replace(f".experts.{expert[0]}.", ".experts.*.")
    if layer_idx < config.num_hidden_layers:
        prefix, target = f"layers.{layer_idx}.", LAYER_MAP.get(below)
    else:
        prefix, target = f"mtp.{layer_idx - config.num_hidden_layers}.", MTP_MAP.get(below)
    if target is None:
        return None
    path, _, part = target.removesuffix("]").partition("[")
    return Place(prefix + path, int(part) if part else None, int(expert[0]) if expert else None)


# ------------------------------------------------------------------------------------------------------------ loading


def load_model(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    max_layers: int | None = None,
    cache_dtype: torch.dtype | None = None,
    attn: AttentionForm = "auto",
    gemm: Gemm | Literal["auto"] = "auto",
    mtp: bool = False,
    quiet: bool = False,
) -> DeepseekModel:
    """Loads a DeepSeek-V2 or -V3 checkpoint, in bfloat16, float32 or FP8.

    Args:
        folder: holds `config.json` and the safetensors.
        device: "cuda" if there is a GPU, else "cpu".
        dtype: of activations and unquantized weights, bfloat16 or float32; by default the checkpoint's (bfloat16 for a
            float16 one).
        max_layers: load the first layers only, for a model that is too large.
        cache_dtype: of the latent cache: `dtype` by default, or float8_e4m3fn for packed FP8 rows.
        attn: the form of attention, see `DeepseekModel`.
        gemm: "fp8" multiplies the projections in FP8 and quantizes a floating-point checkpoint's while loading, "bf16"
            dequantizes an FP8 checkpoint's; "auto" is as the checkpoint has them.
        mtp: load the multi-token prediction modules too, where the checkpoint has them.
        quiet: no progress bar and no log lines.

    Returns:
        The model, ready to run.

    Raises:
        CheckpointError: the checkpoint is broken or not supported; the message names the file or tensor.
        TypeError: `dtype` or `cache_dtype` is not as above.
        ValueError: the FP8 cache for a model whose rows are not 512 + 64 wide.
    """
    checkpoint = Checkpoint(folder, max_layers=max_layers)
    config = checkpoint.config
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.bfloat16 if config.dtype == torch.float16 else config.dtype
    cache_dtype = dtype if cache_dtype is None else cache_dtype
    if cache_dtype not in (dtype, torch.float8_e4m3fn):
        raise TypeError(f"cache_dtype must be the model's {dtype} or torch.float8_e4m3fn, got {cache_dtype}")
    if gemm == "auto":
        gemm = "bf16" if config.quantization is None else "fp8"

    with torch.device("meta"):
        model = DeepseekModel(config, gemm=gemm, dtype=dtype, attn=attn)
        if mtp and checkpoint.has_mtp:
            add_mtp(model)
    model.cache_dtype = cache_dtype
    model.make_cache([])  # refuses FP8 rows that do not fit before anything is read

    is_tied = config.tie_word_embeddings
    found = ((name, find_place(name.removesuffix(SCALE_SUFFIX), config)) for name in checkpoint.tensors)
    places = {
        name: place
        for name, place in found
        if place is not None
        and (mtp or not place.path.startswith("mtp."))
        and not (is_tied and place.path == "lm_head")
    }
    for name, place in places.items():
        if place.path.endswith(".mlp.gate.weight") and checkpoint.tensors[name].dtype != torch.bfloat16:
            gate = model.get_submodule(place.path.removesuffix(".weight"))
            assert isinstance(gate, Gate)
            gate.keep_float32()
    allocate(model, device)

    names = list(places)
    for name, tensor, scale in with_scales(checkpoint.stream(names, quiet=quiet), names):
        store(model, places[name], tensor, scale)

    if not quiet:
        report(checkpoint, names)
    return model.eval()


def allocate(model: nn.Module, device: torch.device) -> None:
    """Gives a model that was built on the meta device its memory, layer by layer, zeroed.

    The zeros stay where no checkpoint writes: the padding between the parts of FP8 layers.
    """
    model.to_empty(device=device)
    for parameter in model.parameters():
        parameter.data.view(torch.uint8).zero_()


def with_scales(tensors: Iterator[tuple[str, Tensor]], names: list[str]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Joins each FP8 weight with its scales, whichever comes first: `(name, tensor, scale or None)`."""
    has_scale = {name.removesuffix(SCALE_SUFFIX) for name in names if name.endswith(SCALE_SUFFIX)}
    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        weight = name.removesuffix(SCALE_SUFFIX)
        if weight not in has_scale:
            yield name, tensor, None
        elif weight not in waiting:
            waiting[weight] = tensor
        elif name == weight:
            yield weight, tensor, waiting.pop(weight)
        else:
            yield weight, waiting.pop(weight), tensor


def store(model: nn.Module, place: Place, tensor: Tensor, scale: Tensor | None) -> None:
    """Puts one tensor of the checkpoint where it belongs."""
    if place.part is None:
        model.get_parameter(place.path).data.copy_(tensor)
        return
    linear = model.get_submodule(place.path)
    assert isinstance(linear, Linear)
    linear.load_part(place.part, tensor, scale, group=place.expert)


def report(checkpoint: Checkpoint, names: list[str]) -> None:
    """Logs what the checkpoint holds and the model does not take."""
    used = set(names)
    unused = [*checkpoint.unused, *(name for name in checkpoint.tensors if name not in used)]
    if checkpoint.has_mtp and not any("eh_proj" in name for name in names):
        log.info("the checkpoint has multi-token prediction weights; they are loaded with mtp=True")
        layers = tuple(f"model.layers.{i}." for i in mtp_layers(checkpoint.config))
        unused = [name for name in unused if not name.startswith(layers)]
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        log.info("not used: %s%s", ", ".join(unused[:3]), more)
