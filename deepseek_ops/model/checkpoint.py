"""A folder of safetensors: checked against its config before anything is read, then streamed shard by shard.

A checkpoint is data from a stranger. So only safetensors is read (nothing here can run code), no path leaves the
folder, and every tensor's name, shape and dtype must be one that the config implies: `expected_tensors` is the list.
What is wrong is said by a subclass of `CheckpointError`, before anything is allocated for it.

Names and FP8 format: the Hugging Face files of the DeepSeek-V2 and -V3 releases.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from deepseek_ops.numeric import BLOCK, FP8, ceil_div

from .config import CheckpointError, ConfigError, DeepseekConfig, open_regular, parse_json, read_json

__all__ = [
    "BadScale",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "DuplicateTensor",
    "MalformedCheckpoint",
    "MissingFile",
    "MissingTensor",
    "TensorInfo",
    "TensorSpec",
    "UnexpectedTensor",
    "UnsafePath",
    "WrongDtype",
    "WrongShape",
    "expected_tensors",
    "mtp_layers",
    "write_checkpoint",
]


class MissingFile(CheckpointError):
    """The folder, its config, its index or a shard is not there."""


class UnsafePath(CheckpointError):
    """A file name or link leads out of the folder, or to something that is not a regular file."""


class MalformedCheckpoint(CheckpointError):
    """An index or a safetensors file breaks its format, or its size cannot be right."""


class MissingTensor(CheckpointError):
    """The config needs a tensor that no shard holds."""


class UnexpectedTensor(CheckpointError):
    """A tensor that the config does not imply."""


class DuplicateTensor(CheckpointError):
    """A tensor that two shards hold."""


class WrongShape(CheckpointError):
    """A tensor's shape is not the one that the config implies."""


class WrongDtype(CheckpointError):
    """A tensor's dtype is not one that its place allows."""


class BadScale(CheckpointError):
    """A scaling factor that is not a finite number above zero."""


# ------------------------------------------------------------------------------------------------ expected tensors

HIGH_PRECISION: Final = (torch.bfloat16, torch.float16, torch.float32)
SCALE_SUFFIX: Final = "_scale_inv"


@dataclass(frozen=True)
class TensorSpec:
    """What a checkpoint of some config must hold under one name."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    """The dtypes that it may have."""
    part: str
    """"embedding", "attention", "dense MLP", "routed experts", "shared experts", "gate", "norms" or "head"."""
    layer_idx: int | None = None
    """None: outside the layers. MTP layers count on from `num_hidden_layers`."""
    is_optional: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def expected_tensors(config: DeepseekConfig) -> dict[str, TensorSpec]:
    """Every tensor that a checkpoint of `config` holds, by Hugging Face name, MTP layers at the end.

    An FP8 `X.weight` of `[n, k]` comes with `X.weight_scale_inv`, `[ceil(n / 128), ceil(k / 128)]` float32: the
    factor to multiply by. Quantized are the projections of attention, MLPs and experts; nothing else is.
    """
    specs: dict[str, TensorSpec] = {}

    def add(name: str, part: str, *shape: int, layer_idx: int | None = None, is_optional: bool = False) -> None:
        specs[name] = TensorSpec(shape, HIGH_PRECISION, part, layer_idx, is_optional)

    add("model.embed_tokens.weight", "embedding", config.vocab_size, config.hidden_size)
    add("model.norm.weight", "norms", config.hidden_size)
    tied = config.tie_word_embeddings
    add("lm_head.weight", "head", config.vocab_size, config.hidden_size, is_optional=tied)
    for layer_idx in range(config.num_hidden_layers):
        _add_layer(specs, config, layer_idx)
    for layer_idx in mtp_layers(config):
        prefix = f"model.layers.{layer_idx}."
        hidden, vocab = config.hidden_size, config.vocab_size
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            add(f"{prefix}{norm}.weight", "norms", hidden, layer_idx=layer_idx)
        add(f"{prefix}eh_proj.weight", "attention", hidden, 2 * hidden, layer_idx=layer_idx)
        # Copies of the main model's, so a file may leave them away.
        add(f"{prefix}embed_tokens.weight", "embedding", vocab, hidden, layer_idx=layer_idx, is_optional=True)
        add(f"{prefix}shared_head.head.weight", "head", vocab, hidden, layer_idx=layer_idx, is_optional=True)
        _add_layer(specs, config, layer_idx)
    return specs


def mtp_layers(config: DeepseekConfig) -> range:
    """The indices under which a checkpoint stores its MTP layers."""
    return range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)


def _add_layer(specs: dict[str, TensorSpec], c: DeepseekConfig, layer_idx: int) -> None:
    prefix = f"model.layers.{layer_idx}."
    heads = c.num_attention_heads

    def add(name: str, part: str, *shape: int) -> None:
        specs[prefix + name] = TensorSpec(shape, HIGH_PRECISION, part, layer_idx)

    def linear(name: str, part: str, n: int, k: int) -> None:
        weight = f"{prefix}{name}.weight"
        specs[weight] = TensorSpec((n, k), (FP8,) if c.quantization else HIGH_PRECISION, part, layer_idx)
        if c.quantization:
            grid = (ceil_div(n, BLOCK), ceil_div(k, BLOCK))
            specs[weight + SCALE_SUFFIX] = TensorSpec(grid, (torch.float32,), part, layer_idx)

    def mlp(name: str, part: str, width: int) -> None:
        linear(f"{name}gate_proj", part, width, c.hidden_size)
        linear(f"{name}up_proj", part, width, c.hidden_size)
        linear(f"{name}down_proj", part, c.hidden_size, width)

    add("input_layernorm.weight", "norms", c.hidden_size)
    if c.q_lora_rank is None:
        linear("self_attn.q_proj", "attention", heads * c.qk_head_dim, c.hidden_size)
    else:
        linear("self_attn.q_a_proj", "attention", c.q_lora_rank, c.hidden_size)
        add("self_attn.q_a_layernorm.weight", "norms", c.q_lora_rank)
        linear("self_attn.q_b_proj", "attention", heads * c.qk_head_dim, c.q_lora_rank)
    linear("self_attn.kv_a_proj_with_mqa", "attention", c.latent_dim, c.hidden_size)
    add("self_attn.kv_a_layernorm.weight", "norms", c.kv_lora_rank)
    linear("self_attn.kv_b_proj", "attention", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    linear("self_attn.o_proj", "attention", c.hidden_size, heads * c.v_head_dim)
    add("post_attention_layernorm.weight", "norms", c.hidden_size)

    if not c.is_moe_layer(layer_idx):
        mlp("mlp.", "dense MLP", c.intermediate_size)
        return
    num_experts = c.n_routed_experts or 0
    add("mlp.gate.weight", "gate", num_experts, c.hidden_size)
    if c.topk_method == "noaux_tc":
        add("mlp.gate.e_score_correction_bias", "gate", num_experts)
    for expert_idx in range(num_experts):
        mlp(f"mlp.experts.{expert_idx}.", "routed experts", c.moe_intermediate_size)
    if c.n_shared_experts:
        mlp("mlp.shared_experts.", "shared experts", c.n_shared_experts * c.moe_intermediate_size)


def _ignorable_tensors(config: DeepseekConfig) -> set[str]:
    """Buffers that some tools save and that follow from the config anyway."""
    num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
    per_layer = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(num_layers)}
    return per_layer | {"model.rotary_emb.inv_freq"}


# ------------------------------------------------------------------------------------------------------ Checkpoint

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
MAX_INDEX_BYTES: Final = 64 << 20
MAX_HEADER_BYTES: Final = 100_000_000
"""The format's own limit."""
MAX_SHARDS: Final = 1000
BYTES_PER_ENTRY: Final = 1024
"""A generous bound of what one tensor takes in an index or a header."""

DTYPES: Final[dict[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": FP8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""What a header may say and what that is here; any other name is refused."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Of its first byte in the file."""
    nbytes: int


def find_file(folder: Path, name: str, blobs_root: Path | None) -> Path:
    """The real path of `folder / name`, links followed, if it may be opened.

    Raises:
        MissingFile: there is none.
        UnsafePath: it lies outside both `folder`, which must be resolved, and `blobs_root`, or is no regular file.
    """
    try:
        path = (folder / name).resolve(strict=True)
    except FileNotFoundError:
        raise MissingFile(f"{name}: not in {folder}") from None
    except (OSError, RuntimeError):  # a loop of links
        raise UnsafePath(f"{name}: cannot be resolved to a file") from None
    if not path.is_relative_to(folder) and not (blobs_root and path.is_relative_to(blobs_root)):
        raise UnsafePath(f"{name}: leads out of the checkpoint's folder, to {path}")
    if not path.is_file():
        raise UnsafePath(f"{name}: not a regular file")
    return path


def default_blobs_root(folder: Path) -> Path | None:
    """Where links of a folder in the Hugging Face cache lead: `../../blobs` of one in `snapshots`."""
    blobs = folder.parent.parent / "blobs"
    return blobs if folder.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink() else None


class Checkpoint:
    """A checkpoint folder whose headers have been read and found to be what its config implies.

    Opening one reads the config, the index and the shards' headers, no weights; it takes well under a second for
    V2-Lite and a few for V3.

    Args:
        folder: holds `config.json` and either `model.safetensors` or `model.safetensors.index.json` with its shards.
        max_layers: take the model to end after so many layers (without MTP). Shards that only hold others need not
            be there.
        blobs_root: a folder outside `folder` into which links may point. By default `../../blobs` if `folder` lies in
            one named `snapshots`, as in the Hugging Face cache; no other link may leave the folder.

    Raises:
        CheckpointError: the subclass says what is wrong, the message where.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        max_layers: int | None = None,
        blobs_root: str | os.PathLike[str] | None = None,
    ) -> None:
        try:
            self.folder = Path(folder).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            raise MissingFile(f"{folder}: there is no such folder") from None
        if not self.folder.is_dir():
            raise MissingFile(f"{folder}: not a folder; a checkpoint is one with config.json and safetensors files")
        self._blobs_root = default_blobs_root(self.folder) if blobs_root is None else Path(blobs_root).resolve()
        try:
            self.full_config = DeepseekConfig.from_json(self.find("config.json"))
        except OSError as error:
            raise MissingFile(f"config.json: {error.strerror}") from None
        self.config = self.full_config if max_layers is None else self.full_config.first_layers(max_layers)
        """The model's config, cut off at `max_layers`."""
        self.tensors: dict[str, TensorInfo] = {}
        """Every tensor of the model by name, in no order."""
        self.unused: list[str] = []
        """Names that were found and are not in `tensors`: other layers, and buffers that follow from the config."""
        self._read_headers()

    @property
    def has_mtp(self) -> bool:
        """Whether the weights of the multi-token prediction layers are there (some tools drop them)."""
        return any(f"model.layers.{i}.eh_proj.weight" in self.tensors for i in mtp_layers(self.config))

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def stream(self, names: Iterable[str] | None = None, *, quiet: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yields `(name, tensor)` shard by shard, in the order in which they lie on the disk.

        The tensors are mapped, not read: their bytes come in when they are used and go when they are dropped, so that
        copying them to a device on the way never holds more than one of them. Writing to one does not change the file.

        Args:
            names: which ones, in any order; all of `tensors` by default.
            quiet: no progress bar. There is none either when standard error is not a terminal.

        Raises:
            KeyError: a name is not in `tensors`.
            BadScale: a scaling factor is not a finite number above zero.
            MalformedCheckpoint: a file is not the size it was.
        """
        wanted = self.tensors if names is None else {name: self.tensors[name] for name in names}
        by_file: dict[Path, list[tuple[int, str]]] = {}
        for name, info in wanted.items():
            by_file.setdefault(info.file, []).append((info.offset, name))
        total = sum(info.nbytes for info in wanted.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=True if quiet else None) as progress:
            for file in sorted(by_file):
                with _open(file) as stream:
                    if os.fstat(stream.fileno()).st_size != self._file_bytes[file]:
                        raise MalformedCheckpoint(f"{file.name}: its size changed while it was being read")
                    mapping = _map(stream)
                for _, name in sorted(by_file[file]):
                    tensor = _view(mapping, wanted[name])
                    if name.endswith(SCALE_SUFFIX):
                        _check_scales(name, tensor)
                    yield name, tensor
                    progress.update(wanted[name].nbytes)

    def read(self, name: str) -> Tensor:
        """One tensor, as `stream` gives it."""
        return next(self.stream([name], quiet=True))[1]

    # -------------------------------------------------------------------------------------------------- opening

    def find(self, name: str) -> Path:
        """The real path of `name` in the folder, links followed, if it may be opened; as `find_file`."""
        return find_file(self.folder, name, self._blobs_root)

    def _read_headers(self) -> None:
        expected = expected_tensors(self.full_config)
        needed = expected if self.config is self.full_config else expected_tensors(self.config)
        known = expected.keys() | _ignorable_tensors(self.full_config)
        weight_map = self._read_weight_map(known)
        files = self._shards_to_open(weight_map, needed)
        self._file_bytes = {file: file.stat().st_size for file in files.values()}
        self._check_total_bytes(expected, needed)

        found: dict[str, TensorInfo] = {}
        place: dict[str, str] = {}
        for shard, file in files.items():
            for name, info in _read_header(file, len(known)).items():
                if name not in known:
                    raise UnexpectedTensor(f"{shard}: holds {_quoted(name)}, which this config does not imply")
                if name in found:
                    raise DuplicateTensor(f"{name}: in both {place[name]} and {shard}")
                if name in expected:
                    _check_spec(name, info, expected[name])
                found[name], place[name] = info, shard
        for name in place if weight_map else ():
            if weight_map.get(name) != place[name]:
                wanted = weight_map.get(name, "no shard")
                raise MalformedCheckpoint(f"{name}: lies in {place[name]}, but the index says {wanted}")
        self.tensors = {name: info for name, info in found.items() if name in needed}
        self.unused = [name for name in found if name not in needed]
        self._check_complete(needed)

    def _read_weight_map(self, known: set[str]) -> dict[str, str]:
        """The index: tensor name -> shard. Empty for a checkpoint in one file."""
        if os.path.lexists(self.folder / SINGLE_NAME):
            return {}
        if not os.path.lexists(self.folder / INDEX_NAME):
            raise MissingFile(f"{self.folder}: holds neither {SINGLE_NAME} nor {INDEX_NAME}")
        limit = min(MAX_INDEX_BYTES, (1 << 20) + BYTES_PER_ENTRY * len(known))
        try:
            weight_map = read_json(self.find(INDEX_NAME), limit, max_containers=100).get("weight_map")
        except ConfigError as error:
            raise MalformedCheckpoint(f"{INDEX_NAME}: {error}") from None
        if not isinstance(weight_map, dict) or not weight_map:
            raise MalformedCheckpoint(f"{INDEX_NAME}: weight_map must be an object from tensor names to shards")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not re.fullmatch(r"[A-Za-z0-9._-]+\.safetensors", shard):
                raise UnsafePath(f"{INDEX_NAME}: {_quoted(shard)} is not the plain name of a safetensors file")
            if name not in known:
                raise UnexpectedTensor(f"{INDEX_NAME}: lists {_quoted(name)}, which this config does not imply")
        num_shards = len(set(weight_map.values()))
        if num_shards > MAX_SHARDS:
            raise MalformedCheckpoint(f"{INDEX_NAME}: at most {MAX_SHARDS} shards, got {num_shards}")
        return weight_map

    def _shards_to_open(self, weight_map: dict[str, str], needed: dict[str, TensorSpec]) -> dict[str, Path]:
        if not weight_map:
            return {SINGLE_NAME: self.find(SINGLE_NAME)}
        is_cut = self.config is not self.full_config
        shards = {shard for name, shard in weight_map.items() if name in needed or not is_cut}
        return {shard: self.find(shard) for shard in sorted(shards)}

    def _check_total_bytes(self, expected: dict[str, TensorSpec], needed: dict[str, TensorSpec]) -> None:
        """Compares the files' sizes with what the config implies, before any is opened."""
        got = sum(self._file_bytes.values())
        first_mtp = self.config.num_hidden_layers
        must = (s for s in needed.values() if not s.is_optional and (s.layer_idx is None or s.layer_idx < first_mtp))
        least = sum(s.numel * min(d.itemsize for d in s.dtypes) for s in must)
        most = sum(s.numel * max(d.itemsize for d in s.dtypes) + BYTES_PER_ENTRY for s in expected.values())
        most += (1 << 20) * len(self._file_bytes)  # padding and metadata
        if not least <= got <= most:
            raise MalformedCheckpoint(
                f"{self.folder.name}: the config implies {least} to {most} bytes of weights, the files have {got}"
            )

    def _check_complete(self, needed: dict[str, TensorSpec]) -> None:
        mtp = set(mtp_layers(self.config))
        has_any_mtp = any(needed[name].layer_idx in mtp for name in self.tensors)
        missing = [
            name
            for name, spec in needed.items()
            if name not in self.tensors and not spec.is_optional and (has_any_mtp or spec.layer_idx not in mtp)
        ]
        if missing:
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise MissingTensor(f"{missing[0]}{others}: the config needs it, no file holds it")


def _check_spec(name: str, info: TensorInfo, spec: TensorSpec) -> None:
    if info.dtype not in spec.dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in spec.dtypes)
        raise WrongDtype(f"{name}: must be {wanted}, got {str(info.dtype).removeprefix('torch.')}")
    if info.shape != spec.shape:
        raise WrongShape(f"{name}: must be {list(spec.shape)}, got {list(info.shape)}")


def _check_scales(name: str, scale: Tensor) -> None:
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise BadScale(f"{name}: scaling factors must be finite and above zero")


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


# --------------------------------------------------------------------------------------------------------- writing


def write_checkpoint(
    folder: str | os.PathLike[str], config: dict[str, Any], shards: Iterable[dict[str, Tensor]], num_shards: int = 1
) -> None:
    """Writes a checkpoint in the Hugging Face layout, one shard at a time.

    `config.json` comes last, so that a folder whose writing was cut short does not pass for a checkpoint.

    Args:
        folder: made if it is not there.
        config: the content of `config.json` (see `DeepseekConfig.to_dict`).
        shards: the tensors of each of the `num_shards` files, by name.

    Raises:
        FileExistsError: the folder is there and not empty.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    weight_map: dict[str, str] = {}
    total_size = 0
    for shard_idx, tensors in enumerate(shards):
        name = SINGLE_NAME if num_shards == 1 else f"model-{shard_idx + 1:05}-of-{num_shards:06}.safetensors"
        save_file({key: x.contiguous() for key, x in tensors.items()}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total_size += sum(x.nbytes for x in tensors.values())
    if num_shards > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------- safetensors files


def _open(file: Path) -> BinaryIO:
    try:
        return open_regular(file)
    except ConfigError as error:
        raise UnsafePath(f"{file.name}: {error}") from None
    except OSError as error:
        raise MissingFile(f"{file.name}: {error.strerror}") from None


def _read_header(file: Path, max_tensors: int) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Its format: 8 bytes of header length, a JSON header, the data."""
    with _open(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < 8:
            raise MalformedCheckpoint(f"{file.name}: {size} bytes are too few for a safetensors file")
        header_bytes = int.from_bytes(stream.read(8), "little")
        limit = min(size - 8, MAX_HEADER_BYTES, (1 << 20) + BYTES_PER_ENTRY * max_tensors)
        if header_bytes > limit:
            raise MalformedCheckpoint(f"{file.name}: a header of {header_bytes} bytes, at most {limit} can be right")
        raw = stream.read(header_bytes)
    if not raw.startswith(b"{"):
        raise MalformedCheckpoint(f"{file.name}: the header must begin with an opening brace")
    try:
        header = parse_json(raw, max_containers=3 * max_tensors + 3000)
    except ConfigError as error:
        raise MalformedCheckpoint(f"{file.name}: header: {error}") from None

    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    tensors = {name: _parse_entry(file, name, entry, data_start) for name, entry in header.items()}
    end = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            what = "overlap" if info.offset < end else "leave a hole"
            raise MalformedCheckpoint(f"{file.name}: its tensors {what} at byte {info.offset}")
        end += info.nbytes
    if end != size:
        raise MalformedCheckpoint(f"{file.name}: its tensors end at byte {end}, the file at byte {size}")
    return tensors


def _parse_entry(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    where = f"{file.name}: {_quoted(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedCheckpoint(f"{where} must have dtype, shape and data_offsets, nothing else")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise MalformedCheckpoint(f"{where} has the unknown dtype {_quoted(dtype_name)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(is_size, shape)):
        raise MalformedCheckpoint(f"{where} has the impossible shape {_quoted(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise MalformedCheckpoint(f"{where} has the impossible data_offsets {_quoted(offsets)}")
    dtype = DTYPES[dtype_name]
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise MalformedCheckpoint(f"{where}: {dtype_name} {_quoted(shape)} does not take {end - begin} bytes")
    return TensorInfo(dtype, tuple(shape), file, data_start + begin, end - begin)


def _map(stream: BinaryIO) -> mmap.mmap:
    """The file's pages, private to this process: written ones are copied, none is reserved ahead."""
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
    mapping = mmap.mmap(stream.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    mapping.madvise(mmap.MADV_SEQUENTIAL)
    return mapping


def _view(mapping: mmap.mmap, info: TensorInfo) -> Tensor:
    raw = torch.frombuffer(mapping, dtype=torch.uint8, count=info.nbytes, offset=info.offset)
    if info.offset % info.dtype.itemsize:
        raw = raw.clone()
    return raw.view(info.dtype).view(info.shape)
