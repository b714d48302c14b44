"""A decode step of a whole model: random weights of any size, a context as if prefilled, and what each op takes of it.

The floor of an op is the time that its bytes or its arithmetic need at least (`bench.Ceilings`). Its bytes are those
of its operands and results, each once; of experts only those that were chosen, of a cache only the tokens that are
there. Activations count, too, though some of them never leave the L2 cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.shapes import GPU
from deepseek_ops.bench import Ceilings
from deepseek_ops.model.config import DeepseekConfig
from deepseek_ops.model.generate import DecodeStep, Sampler
from deepseek_ops.model.linear import Gemm
from deepseek_ops.model.transformer import DeepseekModel
from deepseek_ops.numeric import FP8, FP8_MAX

# ------------------------------------------------------------------------------------------------------- the step

ELEMENTS_AT_ONCE = 1 << 28
"""Of a weight while it is made: one gigabyte in float32."""


def random_model(config: DeepseekConfig, *, gemm: Gemm, device: str, seed: int = 0) -> DeepseekModel:
    """A model that exists nowhere but on its device, scaled as the toy checkpoints are: unit-variance signals."""
    with torch.device("meta"):
        model = DeepseekModel(config, gemm=gemm)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        fill(name, parameter.data, generator)
    return model.eval()


def fill(name: str, weight: Tensor, generator: torch.Generator) -> None:
    if name.endswith("norm"):
        weight.fill_(1.0)
        return
    if name.endswith("weight_scale_inv"):
        weight.fill_((weight.shape[-1] * 128) ** -0.5 * 4 / FP8_MAX)
        return
    if weight.dtype == FP8:
        scale = FP8_MAX / 4  # what exceeds four standard deviations saturates
    elif name.endswith("embed_tokens"):
        scale = 1.0
    elif name.endswith("correction_bias"):
        scale = 0.2
    else:
        scale = (3.0 if name == "lm_head" else 1.0) * weight.shape[-1] ** -0.5
    flat = weight.view(-1)
    for part in flat.split(ELEMENTS_AT_ONCE):
        x = torch.randn(part.shape, generator=generator, device=part.device) * scale
        part.copy_(x.clamp(-FP8_MAX, FP8_MAX) if weight.dtype == FP8 else x)


def step_after(model: DeepseekModel, batch: int, context: int, num_steps: int) -> DecodeStep:
    """A greedy step of `batch` sequences of `context` random latents, which has run once."""
    lengths = [context + num_steps + 1] * batch
    cache = model.make_cache(lengths)
    for pages in cache.pages:
        pages.normal_()
    sequences = [cache.allocate(length) for length in lengths]
    cache.append(sequences, [context] * batch)
    token_ids = torch.randint(0, model.config.vocab_size, (batch,), device=model.device)
    sampler = Sampler(0.0, 1.0, seeds=range(batch), num_draws=num_steps + 1, device=model.device)
    step = DecodeStep(model, cache, cache.append(sequences, [1] * batch), token_ids, sampler)
    step.run()
    return step


def seconds_a_step(call: Callable[[], Tensor], num_steps: int, *, reads_tokens: bool) -> float:
    """`reads_tokens`: the host takes each step's tokens before it goes on, as `generate` does."""
    call()
    synchronize()
    start = time.perf_counter()
    for _ in range(num_steps):
        token_ids = call()
        if reads_tokens:
            token_ids.tolist()
    synchronize()
    return (time.perf_counter() - start) / num_steps


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


# -------------------------------------------------------------------------------------------------- what ops need


@dataclass
class Work:
    """What calls of an op need at least."""

    calls: int = 0
    flops: float = 0.0
    num_bytes: float = 0.0
    multiplied: torch.dtype = torch.bfloat16

    def add(self, other: Work) -> None:
        self.calls += other.calls
        self.flops += other.flops
        self.num_bytes += other.num_bytes
        self.multiplied = other.multiplied


@dataclass(frozen=True)
class Product:
    """An op that multiplies by a weight."""

    weight: int
    """Its place among the arguments."""
    is_transposed: bool
    """`[k, n]`, not `[n, k]`."""
    scales: int | None = None
    offsets: int | None = None
    """The place of where each group's rows end, for experts; with an offset 0 before the first, or without."""


PRODUCTS = {
    "fp8_gemm_nt": Product(2, False),
    "m_grouped_fp8_gemm_nt_offsets": Product(2, False, scales=3, offsets=4),
    "m_grouped_bf16_gemm_nt_offsets": Product(1, False, offsets=2),
    "mm": Product(1, True),
    "bmm": Product(1, True),
    "_grouped_mm": Product(1, True, offsets=2),
}
READ_IN_PART = {"embedding": (0,), "rope": (2,), "mla_cache_write": (3, 5), "mla_decode": (1,), "copy_": (0,)}
"""Op -> arguments of which it reads some rows only, or none: its other operands or results are as large as those."""


def name_of(func: Any) -> str:
    return func._schema.name.partition("::")[2]


def label_of(func: Any, args: tuple[Any, ...]) -> str:
    """The op, with the weight's shape `n x k` where there is one."""
    name = name_of(func)
    if name not in PRODUCTS:
        return name
    *lead, n, k = args[PRODUCTS[name].weight].shape
    if PRODUCTS[name].is_transposed:
        n, k = k, n
    return f"{name} {' x '.join(map(str, (*lead, n, k)))}"


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def work_of(func: Any, args: tuple[Any, ...], out: Any) -> Work:
    """What a call has needed. May read offsets and lengths on the host."""
    name = name_of(func)
    whole = [x for i, x in enumerate(args) if i not in READ_IN_PART.get(name, ())]
    work = Work(1, 0.0, num_bytes(x for x in tree_leaves((whole, out)) if isinstance(x, Tensor)))
    if name == "mla_decode":
        q, kv_cache, _, cache_seqlens, *_ = args
        num_keys = int(cache_seqlens.sum())
        work.num_bytes += num_keys * kv_cache.shape[2] * kv_cache.element_size()
        work.flops = 2 * num_keys * math.prod(q.shape[1:-1]) * (q.shape[-1] + out[0].shape[-1])
    if name in PRODUCTS:
        product = PRODUCTS[name]
        weight = args[product.weight]
        work.multiplied = weight.dtype
        work.flops = 2 * out.numel() * weight.shape[-2 if product.is_transposed else -1]
        if product.offsets is not None:
            ends = args[product.offsets].tolist()[-weight.shape[0] :]
            chosen = sum(end > start for start, end in zip([0, *ends], ends, strict=False))
            read_in_part = [weight] if product.scales is None else [weight, args[product.scales]]
            work.num_bytes -= num_bytes(read_in_part) * (1 - chosen / weight.shape[0])
    return work


# ------------------------------------------------------------------------------------------------- the breakdown

MARK = "op: "


class Ledger(TorchDispatchMode):
    """Marks every call of an op for the profiler, and adds up what the calls of each need."""

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if launches_nothing(func):
            return func(*args, **kwargs)
        label = label_of(func, args)
        with record_function(MARK + label):
            out = func(*args, **kwargs)
        self.work.setdefault(label, Work()).add(work_of(func, args, out))
        return out


def launches_nothing(func: Any) -> bool:
    """A view, or memory without values."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return is_view or "empty" in name_of(func)


def breakdown(step: DecodeStep, ceilings: Ceilings, num_steps: int = 5) -> list[dict[str, Any]]:
    """A row for each op, longest first: its calls, time and floor in a step, in microseconds.

    The times are those of the kernels, launched one by one. In the graph they follow each other more closely.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
    synchronize()
    with profile(activities=activities) as profiler, Ledger() as ledger:
        for _ in range(num_steps):
            step.next()
        synchronize()
    microseconds = dict.fromkeys(ledger.work, 0.0)
    for event in profiler.events():
        if event.name.startswith(MARK) and event.device_type == DeviceType.CPU:
            microseconds[event.name.removeprefix(MARK)] += event.device_time_total if GPU else event.cpu_time_total
    rows = [
        {
            "op": label,
            "calls": work.calls // num_steps,
            "us": microseconds[label] / num_steps,
            "floor_us": ceilings.floor(work.flops, work.num_bytes, work.multiplied) * 1e6 / num_steps,
        }
        for label, work in ledger.work.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])
