"""A collection of hostile checkpoints: each is refused with a typed error, and nothing outside its folder is opened."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_ops.model.checkpoint import (
    BadScale,
    Checkpoint,
    CheckpointError,
    ConfigError,
    DuplicateTensor,
    MalformedCheckpoint,
    MissingFile,
    MissingTensor,
    UnexpectedTensor,
    UnsafePath,
    WrongDtype,
    WrongShape,
    expected_tensors,
)
from deepseek_ops.model.tiny import write_tiny
from tests.model.test_checkpoint import KV_A, NORM, SMALL, rewrite

Attack = Callable[[Path], Any]
SINGLE = "model.safetensors"
SHARD = "model-00001-of-000002.safetensors"
OTHER = "model-00002-of-000002.safetensors"


def raw_file(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file of these parts, padded with a hole in the disk so that its size seems right."""
    size = (folder / SINGLE).stat().st_size
    file = struct.pack("<Q", len(header) if length is None else length) + header + data
    (folder / SINGLE).write_bytes(file)
    os.truncate(folder / SINGLE, max(size, len(file)))


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Attack:
    def attack(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        change(header)
        new = json.dumps(header).encode()
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])

    return attack


def edit_json(file: str, change: Callable[[dict[str, Any]], Any]) -> Attack:
    def attack(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return attack


def edit_map(change: Callable[[dict[str, str]], Any]) -> Attack:
    return edit_json("model.safetensors.index.json", lambda index: change(index["weight_map"]))


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Attack:
    return lambda folder: rewrite(folder, change)


def write(file: str, content: bytes) -> Attack:
    return lambda folder: (folder / file).write_bytes(content)


def replace_by(file: str, make: Callable[[Path], Any]) -> Attack:
    def attack(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return attack


def outside(folder: Path) -> Path:
    """A good file that lies beside the folder, where nothing may look."""
    target = folder.parent / "outside.safetensors"
    shutil.copyfile(next(folder.glob("*.safetensors")), target)
    return target


def add_duplicate(folder: Path) -> None:
    first, second = load_file(folder / SHARD), load_file(folder / OTHER)
    name = next(iter(first))
    second[name] = first[name].clone()
    save_file(second, folder / OTHER)


def swap(header: dict[str, Any]) -> None:
    header[NORM]["data_offsets"].reverse()


def overlap(header: dict[str, Any]) -> None:
    header[KV_A + "_scale_inv"]["data_offsets"] = header[
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
    ]["data_offsets"]


def duplicate_key(folder: Path) -> None:
    raw = (folder / SINGLE).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    again = f',"{NORM}":{json.dumps(header[NORM])}}}'.encode()
    new = raw[8 : 8 + length].rstrip()[:-1] + again
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


def lead_with_a_space(folder: Path) -> None:
    raw = (folder / SINGLE).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    (folder / SINGLE).write_bytes(struct.pack("<Q", length + 1) + b" " + raw[8:])


def many_shards(folder: Path) -> None:
    names = list(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
    weight_map = {name: f"s{i}.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


BIG_ENTRY = {"dtype": "BF16", "shape": [2**62, 4], "data_offsets": [0, 2**65]}
EMPTY_ENTRY = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
INDEX = "model.safetensors.index.json"

HOSTILE: dict[str, tuple[Attack, type[CheckpointError], str, int]] = {}
"""What is done to a good checkpoint, what must be raised, what its message says, and the good one's number of files."""


def hostile(name: str, attack: Attack, error: type[CheckpointError], message: str, num_shards: int = 1) -> None:
    HOSTILE[name] = (attack, error, message, num_shards)


# The format.
hostile("empty file", write(SINGLE, b""), MalformedCheckpoint, "implies")
hostile("seven bytes", lambda f: os.truncate(f / SINGLE, 7), MalformedCheckpoint, "implies")
hostile("header of 2^63 bytes", lambda f: raw_file(f, b"{}", length=2**63), MalformedCheckpoint, "a header of")
hostile("header over 100 MB", lambda f: raw_file(f, b"{}", length=100000001), MalformedCheckpoint, "a header of")
hostile(
    "header past the end",
    lambda f: raw_file(f, b"{}", length=(f / SINGLE).stat().st_size),
    MalformedCheckpoint,
    "header",
)
hostile("header of nothing", lambda f: raw_file(f, b""), MalformedCheckpoint, "opening brace")
hostile(
    "truncated data",
    lambda f: os.truncate(f / SINGLE, (f / SINGLE).stat().st_size - 1),
    MalformedCheckpoint,
    "end at byte",
)
hostile(
    "trailing byte",
    lambda f: os.truncate(f / SINGLE, (f / SINGLE).stat().st_size + 1),
    MalformedCheckpoint,
    "end at byte",
)
hostile("gigabytes of trailing zeros", lambda f: os.truncate(f / SINGLE, 1 << 33), MalformedCheckpoint, "implies")
hostile("overlapping tensors", edit_header(overlap), MalformedCheckpoint, "overlap|leave a hole")
hostile("hole between tensors", edit_header(lambda h: h.pop(NORM)), MalformedCheckpoint, "leave a hole|end at byte")
hostile("reversed range", edit_header(swap), MalformedCheckpoint, "does not take -")
hostile(
    "negative offset",
    edit_header(lambda h: h[NORM].update(data_offsets=[-2, 318])),
    MalformedCheckpoint,
    "impossible data_offsets",
)
hostile(
    "offset beyond 2^64", edit_header(lambda h: h.update({NORM: BIG_ENTRY})), MalformedCheckpoint, "overlap|end at|hole"
)
hostile(
    "offset of a million digits",
    lambda f: raw_file(f, b'{"a":' + b"9" * 10**6 + b"}"),
    MalformedCheckpoint,
    "digits|a header of",
)
hostile(
    "fractional offset",
    edit_header(lambda h: h[NORM].update(data_offsets=[0.0, 320.0])),
    MalformedCheckpoint,
    "impossible data_offsets",
)
hostile(
    "three offsets",
    edit_header(lambda h: h[NORM]["data_offsets"].append(1)),
    MalformedCheckpoint,
    "impossible data_offsets",
)
hostile(
    "shape that does not fit its bytes",
    edit_header(lambda h: h[NORM].update(shape=[161])),
    MalformedCheckpoint,
    "does not take",
)
hostile("negative shape", edit_header(lambda h: h[NORM].update(shape=[-160])), MalformedCheckpoint, "impossible shape")
hostile(
    "shape of a hundred dimensions",
    edit_header(lambda h: h[NORM].update(shape=[1] * 100)),
    MalformedCheckpoint,
    "impossible shape|objects",
)
hostile("unknown dtype", edit_header(lambda h: h[NORM].update(dtype="F8_MAGIC")), MalformedCheckpoint, "unknown dtype")
hostile(
    "dtype that is no string",
    edit_header(lambda h: h[NORM].update(dtype=["BF16"])),
    MalformedCheckpoint,
    "unknown dtype",
)
hostile("entry that is no object", edit_header(lambda h: h.update({NORM: 7})), MalformedCheckpoint, "must have dtype")
hostile("entry with another key", edit_header(lambda h: h[NORM].update(code="x")), MalformedCheckpoint, "nothing else")
hostile("header with a key given twice", duplicate_key, MalformedCheckpoint, "given twice")
hostile("header with a leading space", lead_with_a_space, MalformedCheckpoint, "opening brace")
hostile("header that is not UTF-8", lambda f: raw_file(f, b'{"\xff":1}'), MalformedCheckpoint, "UTF-8")
hostile(
    "header as a depth bomb", lambda f: raw_file(f, b'{"a":' + b"[" * 500000), MalformedCheckpoint, "objects and arrays"
)
hostile("header that is an array", lambda f: raw_file(f, b"[]"), MalformedCheckpoint, "opening brace")
hostile(
    "a hundred thousand empty tensors",
    edit_header(lambda h: h.update({f"t{i}": EMPTY_ENTRY for i in range(100000)})),
    MalformedCheckpoint,
    "implies|a header of",
)
hostile(
    "a hundred empty tensors",
    edit_header(lambda h: h.update({f"t{i}": EMPTY_ENTRY for i in range(100)})),
    CheckpointError,
    "objects|imply",
)
hostile(
    "a pickle by that name",
    write(SINGLE, b"\x80\x04cos\nsystem\n(S'true'\ntR." + b"\x00" * 700000),
    MalformedCheckpoint,
    "header",
)

# The tensors.
hostile(
    "extra tensor",
    edit_tensors(lambda t: t.update({"model.layers.0.evil.weight": torch.ones(3)})),
    UnexpectedTensor,
    "evil",
)
hostile(
    "tensor named like a path",
    edit_tensors(lambda t: t.update({"../../etc/passwd": torch.ones(3)})),
    UnexpectedTensor,
    "etc/passwd",
)
hostile(
    "tensor name with a NUL",
    edit_tensors(lambda t: t.update({NORM + "\x00": torch.ones(3)})),
    UnexpectedTensor,
    "imply",
)
hostile(
    "layer past the last one",
    edit_tensors(lambda t: t.update({"model.layers.9.input_layernorm.weight": torch.ones(160)})),
    UnexpectedTensor,
    "layers.9",
)
hostile("missing tensor", edit_tensors(lambda t: t.pop(NORM)), MissingTensor, NORM)
hostile(
    "missing scale",
    edit_tensors(lambda t: t.pop(KV_A + "_scale_inv")),
    MissingTensor,
    "kv_a_proj_with_mqa.weight_scale_inv",
)
hostile(
    "transposed weight",
    edit_tensors(lambda t: t.update({KV_A: t[KV_A].t().contiguous()})),
    WrongShape,
    r"must be \[80, 160\], got \[160, 80\]",
)
hostile(
    "scale grid of one row too many",
    edit_tensors(lambda t: t.update({KV_A + "_scale_inv": torch.ones(2, 2)})),
    WrongShape,
    r"must be \[1, 2\]",
)
hostile("scalar norm", edit_tensors(lambda t: t.update({NORM: torch.ones(())})), WrongShape, r"got \[\]")
hostile(
    "scale as bytes",
    edit_tensors(lambda t: t.update({KV_A + "_scale_inv": torch.ones(1, 2, dtype=torch.uint8)})),
    WrongDtype,
    "must be float32, got uint8",
)
hostile(
    "FP8 weight in bfloat16",
    edit_tensors(lambda t: t.update({KV_A: t[KV_A].bfloat16()})),
    WrongDtype,
    "must be float8_e4m3fn, got bfloat16",
)
hostile(
    "FP8 weight in the other FP8",
    edit_tensors(lambda t: t.update({KV_A: t[KV_A].float().to(torch.float8_e5m2)})),
    WrongDtype,
    "got float8_e5m2",
)
hostile(
    "norm as integers", edit_tensors(lambda t: t.update({NORM: t[NORM].view(torch.int16)})), WrongDtype, "got int16"
)
hostile("NaN scale", edit_tensors(lambda t: t[KV_A + "_scale_inv"].fill_(float("nan"))), BadScale, "kv_a_proj")
hostile("infinite scale", edit_tensors(lambda t: t[KV_A + "_scale_inv"].fill_(float("inf"))), BadScale, "kv_a_proj")
hostile("negative scale", edit_tensors(lambda t: t[KV_A + "_scale_inv"].neg_()), BadScale, "kv_a_proj")
hostile("one zero scale", edit_tensors(lambda t: t[KV_A + "_scale_inv"][0, 1].zero_()), BadScale, "kv_a_proj")

# The folder.
hostile("nothing but a config", lambda f: (f / SINGLE).unlink(), MissingFile, "neither")
hostile("no config", lambda f: (f / "config.json").unlink(), MissingFile, "config.json")
hostile("weights that are a folder", replace_by(SINGLE, Path.mkdir), UnsafePath, "regular file")
hostile("weights that are a FIFO", replace_by(SINGLE, os.mkfifo), UnsafePath, "regular file")
hostile("weights that are a device", replace_by(SINGLE, lambda p: p.symlink_to("/dev/zero")), UnsafePath, "leads out")
hostile(
    "weights linked from outside",
    lambda f: (outside(f), replace_by(SINGLE, lambda p: p.symlink_to(f.parent / "outside.safetensors"))(f)),
    UnsafePath,
    "leads out",
)
hostile("a loop of links", replace_by(SINGLE, lambda p: p.symlink_to(SINGLE)), UnsafePath, "cannot be resolved")
hostile("a dangling link", replace_by(SINGLE, lambda p: p.symlink_to("gone")), MissingFile, SINGLE)
hostile("config that is a FIFO", replace_by("config.json", os.mkfifo), UnsafePath, "regular file")
hostile(
    "config linked from outside",
    replace_by("config.json", lambda p: p.symlink_to("/etc/passwd")),
    UnsafePath,
    "leads out",
)
hostile(
    "index linked from outside", replace_by(INDEX, lambda p: p.symlink_to("/etc/passwd")), UnsafePath, "leads out", 2
)

# The index.
hostile("map into /etc", edit_map(lambda m: m.update({NORM: "../../etc/passwd"})), UnsafePath, "not the plain name", 2)
hostile(
    "map to an absolute path",
    edit_map(lambda m: m.update({NORM: "/etc/x.safetensors"})),
    UnsafePath,
    "not the plain name",
    2,
)
hostile(
    "map to the parent",
    lambda f: (outside(f), edit_map(lambda m: m.update({NORM: "../outside.safetensors"}))(f)),
    UnsafePath,
    "not the plain name",
    2,
)
hostile(
    "map with a backslash",
    edit_map(lambda m: m.update({NORM: "..\\a.safetensors"})),
    UnsafePath,
    "not the plain name",
    2,
)
hostile("map with a newline", edit_map(lambda m: m.update({NORM: SHARD + "\n"})), UnsafePath, "not the plain name", 2)
hostile(
    "map to a pickle", edit_map(lambda m: m.update({NORM: "pytorch_model.bin"})), UnsafePath, "not the plain name", 2
)
hostile("map to a number", edit_map(lambda m: m.update({NORM: 1})), UnsafePath, "not the plain name", 2)
hostile(
    "map to a missing shard",
    edit_map(lambda m: m.update({NORM: "gone.safetensors"})),
    MissingFile,
    "gone.safetensors",
    2,
)
hostile(
    "map to the wrong shard",
    edit_map(lambda m: m.update({NORM: SHARD if m[NORM] == OTHER else OTHER})),
    MalformedCheckpoint,
    "but the index says",
    2,
)
hostile("map with an extra name", edit_map(lambda m: m.update(evil=SHARD)), UnexpectedTensor, "evil", 2)
hostile("map that leaves a tensor out", edit_map(lambda m: m.pop(NORM)), MalformedCheckpoint, "no shard", 2)
hostile("map to over a thousand shards", many_shards, CheckpointError, "shards|not in", 2)
hostile(
    "map that is an array",
    edit_json(INDEX, lambda i: i.update(weight_map=[])),
    MalformedCheckpoint,
    "weight_map must be",
    2,
)
hostile("no map", edit_json(INDEX, lambda i: i.pop("weight_map")), MalformedCheckpoint, "weight_map must be", 2)
hostile("tensor in two shards", add_duplicate, DuplicateTensor, "in both", 2)
hostile(
    "shard linked from outside",
    lambda f: (outside(f), replace_by(SHARD, lambda p: p.symlink_to(f.parent / "outside.safetensors"))(f)),
    UnsafePath,
    "leads out",
    2,
)
hostile(
    "shard swapped for the other",
    lambda f: shutil.copyfile(f / SHARD, f / OTHER),
    DuplicateTensor,
    "in both",
    2,
)
hostile(
    "index with a key given twice",
    write(INDEX, b'{"weight_map":{"a":"b"},"weight_map":{}}'),
    MalformedCheckpoint,
    "given twice",
    2,
)
hostile("index that is not UTF-8", write(INDEX, b"\xff\xfe\x00"), MalformedCheckpoint, "UTF-8", 2)
hostile("index as a depth bomb", write(INDEX, b"[" * 1000000), MalformedCheckpoint, "objects and arrays", 2)
hostile("index over 64 MB", lambda f: os.truncate(f / INDEX, (64 << 20) + 1), MalformedCheckpoint, "at most", 2)
hostile("index that is cut off", write(INDEX, b'{"weight_map": {"a'), MalformedCheckpoint, "not valid JSON", 2)

# The config.
hostile(
    "config with hidden = 2^40",
    edit_json("config.json", lambda c: c.update(hidden_size=2**40)),
    ConfigError,
    "hidden_size",
)
hostile(
    "config with negative layers",
    edit_json("config.json", lambda c: c.update(num_hidden_layers=-1)),
    ConfigError,
    "num_hidden_layers",
)
hostile(
    "config with 10^9 layers",
    edit_json("config.json", lambda c: c.update(num_hidden_layers=10**9)),
    ConfigError,
    "num_hidden_layers",
)
hostile(
    "config of a far larger model",
    edit_json("config.json", lambda c: c.update(hidden_size=131072)),
    MalformedCheckpoint,
    "implies",
)
hostile(
    "config of a far smaller model",
    edit_json("config.json", lambda c: c.update(hidden_size=8, vocab_size=300, num_hidden_layers=1)),
    CheckpointError,
    "implies|imply|must be",
)
hostile("config that is not UTF-8", write("config.json", b"\xff\xff"), ConfigError, "UTF-8")
hostile("config as a depth bomb", write("config.json", b'{"a":' * 200000), ConfigError, "objects and arrays")
hostile(
    "config with code",
    edit_json("config.json", lambda c: c.update(model_type="evil", auto_map={"AutoModel": "x.Y"})),
    ConfigError,
    "model_type",
)


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A good checkpoint in one file and one in two."""
    folders = {num_shards: tmp_path_factory.mktemp("good") for num_shards in (1, 2)}
    for num_shards, folder in folders.items():
        write_tiny(folder, "v3", num_shards=num_shards, **SMALL)
        list(Checkpoint(folder).stream())
    return folders


def make_hostile(name: str, good: dict[int, Path], folder: Path) -> None:
    attack, _, _, num_shards = HOSTILE[name]
    shutil.copytree(good[num_shards], folder)
    attack(folder)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_with_a_typed_error(name: str, good: dict[int, Path], tmp_path: Path) -> None:
    make_hostile(name, good, tmp_path / "checkpoint")
    _, error, message, _ = HOSTILE[name]
    with pytest.raises(error, match=message):
        list(Checkpoint(tmp_path / "checkpoint").stream())


def test_more_than_a_thousand_shards_are_refused(tmp_path: Path) -> None:
    config = write_tiny(tmp_path, "v2", num_shards=2, **SMALL | {"n_routed_experts": 512})
    names = list(expected_tensors(config))
    weight_map = {name: f"s{i}.safetensors" for i, name in enumerate(names)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(MalformedCheckpoint, match=r"at most 1000 shards, got 1\d\d\d"):
        Checkpoint(tmp_path)


AUDIT = """
import json, os, sys
import tqdm.std, multiprocessing.synchronize  # what a first progress bar imports
from deepseek_ops.model.checkpoint import Checkpoint, CheckpointError

CODE = ("subprocess", "os.system", "os.exec", "os.posix_spawn", "socket", "exec", "compile", "marshal", "pickle")
opened, ran, watch = [], [], False

def hook(event, args):
    if not watch:
        return
    if event == "open" and not isinstance(args[0], int):
        opened.append(os.fsdecode(args[0]))
    elif event.startswith(CODE) or event == "import" and "pickle" in args[0]:
        ran.append(f"{event} {args}")

sys.addaudithook(hook)
for name in sorted(os.listdir(sys.argv[1])):
    folder = os.path.realpath(os.path.join(sys.argv[1], name, "checkpoint"))
    opened.clear()
    ran.clear()
    watch = True
    try:
        list(Checkpoint(folder).stream(quiet=True))
        outcome = "accepted"
    except CheckpointError:
        outcome = "refused"
    watch = False
    outside = [path for path in opened if not os.path.realpath(path).startswith(folder + os.sep)]
    print(json.dumps([name, outcome, outside, ran, len(opened)]))
"""


def test_no_hostile_checkpoint_makes_anything_outside_its_folder_open_or_any_code_run(
    good: dict[int, Path], tmp_path: Path
) -> None:
    folders = {f"{i:03}": name for i, name in enumerate(HOSTILE)} | {"good": "good"}
    for number, name in folders.items():
        (tmp_path / number).mkdir()
        if name == "good":
            shutil.copytree(good[1], tmp_path / number / "checkpoint")
        else:
            make_hostile(name, good, tmp_path / number / "checkpoint")
    limit = 6 << 30  # of address space: what a header claims must not be allocated
    run = subprocess.run(
        [sys.executable, "-c", AUDIT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    reports = {folders[name]: report for name, *report in map(json.loads, run.stdout.splitlines())}
    assert reports["good"] == ["accepted", [], [], 3]  # config, header, weights: so the hook does see what is opened
    del reports["good"]
    assert {name: report[:3] for name, report in reports.items()} == {name: ["refused", [], []] for name in HOSTILE}
    assert len(HOSTILE) >= 30
