"""The command line: `deepseek-ops` or `python -m deepseek_ops`, with generate, info, tiny, quantize and ops.

What a user can get wrong ends in one sentence on standard error and exit code 1 (2 for the arguments themselves).
Results go to standard output; progress, notes and figures of a run go to standard error.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from deepseek_ops.library import build_info

if TYPE_CHECKING:
    import torch

    from deepseek_ops.model.checkpoint import Checkpoint
    from deepseek_ops.model.config import DeepseekConfig
    from deepseek_ops.registry import Op

__all__ = ["main"]


class UserError(Exception):
    """Something that the user can put right; the message is all there is to say."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = _parser().parse_args(argv)
    _log_to_stderr(getattr(args, "quiet", False))
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, ValueError, OSError) as error:
        return _fail(str(error))
    except RuntimeError as error:
        if type(error).__name__ in ("OutOfMemoryError", "CacheFullError"):
            return _fail(f"out of memory: {error}")
        raise


def _fail(message: str) -> int:
    print(f"deepseek-ops: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def _log_to_stderr(quiet: bool) -> None:
    logger = logging.getLogger("deepseek_ops")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    if not logger.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever `sys.stderr` is at the time."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


# ---------------------------------------------------------------------------------------------------------- arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepseek-ops", description="DeepSeek-V2 and -V3 models on hand-written kernels, or without a GPU."
    )
    parser.add_argument("--version", action="version", version=build_info["version"])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a prompt with a model")
    generate.set_defaults(run=_generate)
    generate.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with config.json and safetensors")
    generate.add_argument("-p", "--prompt", required=True, help="the prompt; - reads it from standard input")
    generate.add_argument("--system", help="a system message, with a chat template")
    generate.add_argument("-n", "--max-new-tokens", type=_count, default=128, metavar="N", help="default: 128")
    generate.add_argument("--temperature", type=_not_negative, default=0.0, help="0, the default, is greedy")
    generate.add_argument("--top-p", type=_probability, default=1.0, help="default: 1")
    generate.add_argument("--seed", type=int, default=0, help="of the sampling; default: 0")
    generate.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")
    form = generate.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="use the chat template (the default where there is one)")
    form.add_argument("--raw", action="store_true", help="continue the prompt as plain text")
    generate.add_argument("--think", action="store_true", help="let models that can reason first (V3.1)")
    generate.add_argument("--device", help="cuda or cpu; by default cuda where there is a GPU")
    generate.add_argument("--dtype", choices=["bf16", "f32"], help="of activations; by default the checkpoint's")
    generate.add_argument("--max-layers", type=_count, metavar="N", help="run only the first N layers")
    generate.add_argument("--cache", choices=["bf16", "fp8"], default="bf16", help="rows of the latent cache")
    generate.add_argument("--attn", choices=["auto", "absorbed", "expanded"], default="auto", help="form of attention")
    generate.add_argument("--gemm", choices=["auto", "bf16", "fp8"], default="auto", help="of the projections")
    generate.add_argument("--no-graph", action="store_true", help="launch decode steps without a CUDA graph")
    generate.add_argument("-q", "--quiet", action="store_true", help="print nothing but the text")

    info = commands.add_parser("info", help="what this installation runs where, and what a checkpoint needs")
    info.set_defaults(run=_info)
    info.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="folder with config.json and safetensors")
    info.add_argument("--memory", type=_gigabytes, metavar="GB", help="memory to fit into; by default what is free")

    tiny = commands.add_parser("tiny", help="write a toy checkpoint with random weights")
    tiny.set_defaults(run=_tiny)
    tiny.add_argument("out", metavar="OUT", help="folder to make")
    tiny.add_argument("--family", choices=["v2-lite", "v2", "v3", "r1", "v3.1"], default="v3", help="default: v3")
    tiny.add_argument("--seed", type=int, default=0, help="of the weights; default: 0")
    tiny.add_argument("--layers", type=_count, metavar="N", help="number of layers")
    tiny.add_argument("--shards", type=_count, default=1, metavar="N", help="number of files; default: 1")
    tiny.add_argument("--real-mla", action="store_true", help="the releases' head sizes, as the kernels need them")
    tiny.add_argument("--fp8", action=argparse.BooleanOptionalAction, help="FP8 weights; by default as the release")
    tiny.add_argument("--yarn", action=argparse.BooleanOptionalAction, default=True, help="YaRN; on by default")

    quantize = commands.add_parser("quantize", help="turn a checkpoint into block FP8, the format of the V3 release")
    quantize.set_defaults(run=_quantize)
    quantize.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with a bf16, f16 or f32 checkpoint")
    quantize.add_argument("out", metavar="OUT", help="folder to make")
    quantize.add_argument("--scale-fmt", choices=["ue8m0"], help="scales as powers of two, as in V3.1")
    quantize.add_argument("--device", default="cpu", help="where to quantize; default: cpu")
    quantize.add_argument("-q", "--quiet", action="store_true", help="no progress bar")

    ops = commands.add_parser("ops", help="run a small case of every op: backend, error and time")
    ops.set_defaults(run=_ops)
    ops.add_argument("--device", help="cuda or cpu; by default cuda where there is a GPU")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def _gigabytes(text: str) -> int:
    return int(_not_negative(text) * 1e9)


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA GPU that torch can use; run with --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"there is no {name}: torch sees {torch.cuda.device_count()} GPUs")
    elif device.type != "cpu":
        raise UserError(f"device {name!r} is not supported: cpu, cuda or cuda:N")
    return device


# ----------------------------------------------------------------------------------------------------------- generate


def _generate(args: argparse.Namespace) -> int:
    import torch

    from deepseek_ops.model.generate import generate
    from deepseek_ops.model.loading import load_model
    from deepseek_ops.model.tokenizer import Tokenizer

    device = _device(args.device)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    tokenizer = Tokenizer.from_folder(args.checkpoint)
    if args.chat or (tokenizer.chat_template is not None and not args.raw):
        messages = [{"role": "system", "content": args.system}] if args.system else []
        prompt_ids = tokenizer.encode_chat([*messages, {"role": "user", "content": prompt}], think=args.think)
    elif args.think or args.system:
        raise UserError("--think and --system need a chat template, which this checkpoint lacks or --raw turned off")
    else:
        prompt_ids = tokenizer.encode(prompt)
    if not prompt_ids:
        raise UserError("the prompt is empty")

    model = load_model(
        args.checkpoint,
        device=device,
        dtype={None: None, "bf16": torch.bfloat16, "f32": torch.float32}[args.dtype],
        max_layers=args.max_layers,
        cache_dtype=torch.float8_e4m3fn if args.cache == "fp8" else None,
        attn=args.attn,
        gemm=args.gemm,
        quiet=args.quiet,
    )
    stop = set(model.config.stop_token_ids)
    if tokenizer.eos_token_id is not None:
        stop.add(tokenizer.eos_token_id)
    run = generate(
        model,
        prompt_ids,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop_token_ids=() if args.ignore_eos else sorted(stop),
        use_graph=not args.no_graph,
    )
    interrupted = False
    try:
        for text in tokenizer.decode_stream(run):
            _print_text(text)
    except KeyboardInterrupt:
        interrupted = True
    print(flush=True)
    if not args.quiet:
        _print_figures(model.config, len(prompt_ids), run, model.cache_dtype)
    return 130 if interrupted else 0


def _print_text(text: str) -> None:
    """Prints a piece of text, whatever the terminal can show of it."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding), end="", flush=True)


def _print_figures(config: DeepseekConfig, num_prompt: int, run: Any, cache_dtype: torch.dtype) -> None:
    from deepseek_ops.model.memory import cache_sizes

    sizes = cache_sizes(config)
    ours = (
        sizes.fp8 if cache_dtype.itemsize == 1 else config.num_hidden_layers * config.latent_dim * cache_dtype.itemsize
    )
    decode = f"{(run.num_tokens - 1) / run.decode_seconds:.1f} tokens/s" if run.decode_seconds else "no decode step"
    print(
        f"\n{run.num_tokens} tokens; prefill of {num_prompt} in {run.prefill_seconds * 1e3:.1f} ms; {decode}\n"
        f"cache per token {_size(ours)}; multi-head attention of this shape would take {_size(sizes.mha)}, "
        f"grouped-query with 8 heads {_size(sizes.gqa8)}",
        file=sys.stderr,
    )


# --------------------------------------------------------------------------------------------------------------- info


def _info(args: argparse.Namespace) -> None:
    import torch

    from deepseek_ops.registry import OPS

    capability: tuple[int, int] | None = None
    gpu = "none that torch can use"
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        gpu = f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}, {_size(total)}"
    kernels = "no (built without CUDA)"
    if build_info["cuda"]:
        kernels = f"for sm_{', sm_'.join(build_info['archs'])}, by nvcc {build_info['nvcc']}"
    _print_pairs(
        [
            ("deepseek-ops", build_info["version"]),
            ("kernels", kernels),
            ("built against torch", f"{build_info['torch_built']} (needs {build_info['torch_min']} or newer)"),
            ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
            ("python", platform.python_version()),
            ("GPU", gpu),
        ]
    )
    print("\nops on " + ("this GPU" if capability else "the CPU"))
    _print_table([(op.name, *_backend(op, capability)) for op in OPS.values()])

    if args.checkpoint:
        from deepseek_ops.model.checkpoint import Checkpoint

        print()
        _print_checkpoint(Checkpoint(args.checkpoint), args.memory)


def _backend(op: Op, capability: tuple[int, int] | None) -> tuple[str, str]:
    """Which backend runs an op on the GPU of this capability (None: on the CPU), and why."""
    if capability is None:
        return "reference", "no GPU" + (", has a kernel" if op.has_kernel else "")
    if not op.has_kernel:
        return "reference", "built without CUDA" if not build_info["cuda"] else "has no kernel"
    if not any(_runs_on(arch, capability) for arch in build_info["archs"]):
        return "reference", f"kernels are for sm_{', sm_'.join(build_info['archs'])}"
    return "kernel", ""


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for `arch` ("90a", "90", "100f") runs on a GPU of this capability."""
    digits = arch.rstrip("af")
    major, minor = int(digits[:-1]), int(digits[-1])
    if arch.endswith("a"):  # for exactly this chip
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def _print_checkpoint(checkpoint: Checkpoint, memory: int | None) -> None:
    from deepseek_ops.model.memory import (
        cache_sizes,
        count_parameters,
        fit,
        weight_bytes_by_dtype,
        weight_bytes_by_part,
    )

    config = checkpoint.config
    parameters = count_parameters(config)
    experts = "none"
    if config.n_routed_experts:
        experts = (
            f"{config.n_routed_experts} routed ({config.num_experts_per_tok} per token, {config.n_group} groups), "
            f"{config.n_shared_experts} shared, from layer {config.first_k_dense_replace} on"
        )
    weights = "FP8 in 128 x 128 blocks" if config.quantization else "not quantized"
    if config.quantization and config.quantization.scale_fmt:
        weights += f", {config.quantization.scale_fmt} scales"
    mtp = f", multi-token prediction: {config.num_nextn_predict_layers} layer" if checkpoint.has_mtp else ""
    num_files = len({info.file for info in checkpoint.tensors.values()})
    count = "1 file" if num_files == 1 else f"{num_files} files"
    _print_pairs(
        [
            ("checkpoint", f"{checkpoint.folder.name}: DeepSeek-{config.family}"),
            ("layers", f"{config.num_hidden_layers} of width {config.hidden_size}{mtp}"),
            (
                "attention",
                f"{config.num_attention_heads} heads, latent {config.kv_lora_rank} + {config.qk_rope_head_dim}",
            ),
            ("experts", experts),
            ("context", f"{config.max_position_embeddings} tokens at most"),
            (
                "weights",
                f"{weights}; {_size(checkpoint.nbytes)}, {len(checkpoint.tensors)} tensors, {count}",
            ),
            (
                "parameters",
                f"{_billions(parameters.total)}, of which a token goes through {_billions(parameters.active)}",
            ),
        ]
    )
    if checkpoint.unused:
        print(f"not used: {len(checkpoint.unused)} tensors, such as {checkpoint.unused[0]}")

    print("\nby part")
    bytes_by_part = weight_bytes_by_part(checkpoint)
    counts = parameters.by_part | ({"MTP": parameters.mtp} if "MTP" in bytes_by_part else {})
    rows = [(part, _billions(count), _size(bytes_by_part.get(part, 0))) for part, count in counts.items() if count]
    _print_table(rows)
    print("\nby dtype")
    dtypes = weight_bytes_by_dtype(checkpoint).items()
    _print_table([(str(d).removeprefix("torch."), f"{count} tensors", _size(size)) for d, (count, size) in dtypes])

    sizes = cache_sizes(config)
    has_fp8_cache = (config.kv_lora_rank, config.qk_rope_head_dim) == (512, 64)
    print("\ncache per token, all layers")
    _print_table(
        [
            ("latent, bf16", _size(sizes.bf16), ""),
            *([("latent, FP8", _size(sizes.fp8), f"{sizes.fp8 / sizes.bf16:.1%} of bf16")] if has_fp8_cache else []),
            ("multi-head attention", _size(sizes.mha), f"the latent is {sizes.bf16 / sizes.mha:.2%} of it"),
            ("grouped-query, 8 heads", _size(sizes.gqa8), f"the latent is {sizes.bf16 / sizes.gqa8:.1%} of it"),
        ]
    )

    free, where = (memory, "--memory") if memory is not None else _free_memory()
    print(f"\nin {_size(free)} ({where})")
    whole = fit(config, free, checkpoint=checkpoint)
    if whole.is_whole:
        print(f"the model fits: weights take {_size(whole.weight_bytes)}")
        fp8 = fit(config, free, checkpoint=checkpoint, cache="fp8")
        in_fp8 = f", {fp8.context} in FP8" if has_fp8_cache else ""
        print(f"cache for {whole.context} tokens in bf16{in_fp8}, over all requests")
    elif whole.num_layers:
        print(f"the model does not fit: weights take {_size(whole.weight_bytes)}")
        print(
            f"its first {whole.num_layers} layers do (--max-layers {whole.num_layers}): {whole.context} tokens of cache"
        )
    else:
        print(f"not even one layer fits: weights take {_size(whole.weight_bytes)}")


def _free_memory() -> tuple[int, str]:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], "free on the GPU"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"), "free in this machine"


# ------------------------------------------------------------------------------------------------ tiny, quantize, ops


def _tiny(args: argparse.Namespace) -> None:
    from deepseek_ops.model.tiny import write_tiny

    fields = {} if args.layers is None else {"num_hidden_layers": args.layers}
    config = write_tiny(
        args.out,
        args.family,
        seed=args.seed,
        num_shards=args.shards,
        real_mla=args.real_mla,
        fp8=args.fp8,
        yarn=args.yarn,
        **fields,
    )
    print(f"{args.out}: a toy DeepSeek-{config.family} of {config.num_hidden_layers} layers, random weights")


def _quantize(args: argparse.Namespace) -> None:
    from deepseek_ops.model.checkpoint import Checkpoint
    from deepseek_ops.model.quantization import quantize_checkpoint

    device = _device(args.device)
    quantize_checkpoint(args.checkpoint, args.out, scale_fmt=args.scale_fmt, device=device, quiet=args.quiet)
    before, after = Checkpoint(args.checkpoint).nbytes, Checkpoint(args.out).nbytes
    print(f"{args.out}: {_size(after)} of weights, {after / before:.0%} of {_size(before)}")


def _ops(args: argparse.Namespace) -> int:
    from deepseek_ops.op_table import print_op_table

    return 0 if print_op_table(str(_device(args.device))) else 1


# --------------------------------------------------------------------------------------------------------------- text


def _size(nbytes: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError


def _billions(count: int) -> str:
    return f"{count / 1e9:.3f} B" if count >= 1e8 else f"{count / 1e6:.3f} M"


def _print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    _print_table([(f"{name}:", value) for name, value in pairs])


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Columns aligned to the left, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
