"""Decode steps: of toy models, of V2-Lite's size, and of as many layers of V3 as fit; random weights, in a CUDA graph.

    pytest benchmarks/bench_decode_step.py --results FILE [--max-layers N] [--cases V3]

A step's floor is the sum of its ops' floors (benchmarks/decode.py): the weights that it reads and the cache, mostly.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.conftest import RESULTS
from benchmarks.decode import breakdown, random_model, seconds_a_step, step_after
from benchmarks.harness import Results
from benchmarks.report import OUT_OF_TIME
from benchmarks.shapes import DEVICE, GPU
from deepseek_ops.bench import Ceilings
from deepseek_ops.model import DeepseekConfig, DeepseekModel, generate_batch, load_model
from deepseek_ops.model.config import RELEASED
from deepseek_ops.model.generate import DecodeGraph
from deepseek_ops.model.linear import Gemm
from deepseek_ops.model.memory import fit
from deepseek_ops.model.tiny import tiny_config, write_tiny

NEW_TOKENS = 32 if GPU else 8


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny(folder)
    return load_model(folder, device=DEVICE)


@pytest.mark.parametrize("batch", [1, 4])
def test_generation(benchmark, results, toy, batch: int):
    """What a step costs beside its kernels."""
    prompts = [list(range(1 + i, 17 + i)) for i in range(batch)]
    num_tokens, seconds = [], []

    def run() -> None:
        generation = generate_batch(toy, prompts, max_new_tokens=NEW_TOKENS)
        steps = list(generation)
        # The first token comes with the prompt; an end-of-text token may end a prompt early.
        num_tokens.append(sum(token is not None for step in steps[1:] for token in step))
        seconds.append(generation.decode_seconds)

    benchmark.pedantic(run, rounds=1 if benchmark.disabled else 3, warmup_rounds=0 if benchmark.disabled else 1)
    assert num_tokens[-1] > 0
    if not benchmark.disabled:
        best = max(n / s for n, s in zip(num_tokens, seconds, strict=True))
        benchmark.extra_info.update(tokens_per_second=best)
        results.add_generation("toy checkpoint", batch, best)


# ------------------------------------------------------------------------------------------------- real sizes

MODELS: dict[str, tuple[DeepseekConfig, Gemm, int]] = {
    "V2-Lite, bf16": (RELEASED["v2-lite"], "bf16", 1024),
    "V2-Lite, FP8": (RELEASED["v2-lite"], "fp8", 1024),
    "V3, FP8": (RELEASED["v3"], "fp8", 4096),
}
"""Name -> architecture, how it multiplies, tokens of context."""
STAND_INS: dict[str, tuple[DeepseekConfig, Gemm, int]] = {
    "toy V2-Lite, bf16": (tiny_config("v2-lite"), "bf16", 70),
    "toy V3, FP8": (tiny_config("v3"), "fp8", 70),
}
BATCHES = (1, 16, 64) if GPU else (1, 3)
NUM_STEPS = 64 if GPU else 1
"""Timed at a time, over which the context grows."""
LONGEST_STEPS = 4 * NUM_STEPS + 16
CACHE_BYTES = 8 << 30
"""Left free beside the weights, for the cache and for what a step allocates."""


def test_transformers(benchmark, results: Results):
    """V2-Lite as transformers runs it, in bfloat16 on random weights. First, for it needs memory of its own."""
    transformers = pytest.importorskip("transformers")
    if time.monotonic() > results.deadline:
        pytest.skip(OUT_OF_TIME)
    name, (config, _, context) = next(iter((MODELS if GPU else STAND_INS).items()))
    theirs = transformers.AutoConfig.for_model(**config.to_dict())
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(theirs, dtype=torch.bfloat16).eval()
    label = f"{name.partition(',')[0]}, bf16, transformers {transformers.__version__}"

    def measure() -> None:
        for batch in BATCHES:
            seconds = transformers_seconds_a_step(model, batch, context, num_steps=16 if GPU else 1)
            if not benchmark.disabled:
                results.add_generation(label, batch, batch / seconds)

    benchmark.pedantic(measure, rounds=1)
    model.to("meta")
    if GPU:
        torch.cuda.empty_cache()


@torch.inference_mode()
def transformers_seconds_a_step(model: Any, batch: int, context: int, num_steps: int) -> float:
    """Of greedy decoding over its own cache, after a prefill of random tokens."""
    token_ids = torch.randint(0, model.config.vocab_size, (batch, context), device=DEVICE)
    state: dict[str, Any] = {"past_key_values": None}

    def advance(token_ids: torch.Tensor) -> torch.Tensor:
        out = model(token_ids, past_key_values=state["past_key_values"], use_cache=True, logits_to_keep=1)
        state["past_key_values"], state["token_ids"] = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        return state["token_ids"]

    advance(token_ids)
    return seconds_a_step(lambda: advance(state["token_ids"]), num_steps, reads_tokens=True)


@pytest.fixture(scope="module", params=MODELS if GPU else STAND_INS)
def model(request: pytest.FixtureRequest) -> Iterator[tuple[str, DeepseekModel, int]]:
    """A model's name, with the number of its layers where that is not all; the model; tokens of context."""
    config, gemm, context = (MODELS if GPU else STAND_INS)[request.param]
    results, name = request.config.stash[RESULTS], request.param
    if time.monotonic() > results.deadline:
        pytest.skip(OUT_OF_TIME)
    if GPU:
        _ = results.ceilings  # needs memory of its own, so before there is a model
        torch.cuda.empty_cache()
    num_layers = layers_to_run(config, request.config.getoption("--max-layers"))
    if num_layers < config.num_hidden_layers:
        name = f"{name}, {num_layers} of {config.num_hidden_layers} layers"
    made = random_model(replace(config, num_hidden_layers=num_layers), gemm=gemm, device=DEVICE)
    yield name, made, context
    made.to("meta")  # gives back the memory, whoever still holds the model
    if GPU:
        torch.cuda.empty_cache()


def layers_to_run(config: DeepseekConfig, max_layers: int | None) -> int:
    """As many as fit, and `max_layers` at most."""
    if GPU:
        fitting = fit(config, torch.cuda.mem_get_info()[0], reserve_bytes=CACHE_BYTES).num_layers
    else:
        fitting = config.num_hidden_layers
    if fitting == 0:
        pytest.skip("not one layer fits")
    return min(fitting, max_layers or fitting)


@pytest.mark.parametrize("batch", BATCHES)
def test_decode_step(benchmark, results: Results, model: tuple[str, DeepseekModel, int], batch: int):
    name, made, context = model
    if time.monotonic() > results.deadline:
        pytest.skip(OUT_OF_TIME)
    step = step_after(made, batch, context, LONGEST_STEPS)
    graph = DecodeGraph(step) if made.can_be_captured(step.batch) else step
    graph.next()
    tokens = benchmark.pedantic(lambda: graph.next().tolist(), rounds=NUM_STEPS, warmup_rounds=1)
    assert len(tokens) == batch
    assert step.logits is not None
    assert step.logits.isfinite().all()

    seconds = seconds_a_step(graph.next, NUM_STEPS, reads_tokens=False)
    with_tokens = seconds_a_step(graph.next, NUM_STEPS, reads_tokens=True)
    ceilings = results.ceilings if GPU else Ceilings(10.0, 10.0, None)
    ops = breakdown(step, ceilings, num_steps=5 if GPU else 1)
    assert sum(row["floor_us"] for row in ops) > 0
    if benchmark.disabled:
        return
    row = {
        "model": name,
        "batch": batch,
        "context": context,
        "graph": graph is not step,
        "step_us": seconds * 1e6,
        "floor_us": sum(row["floor_us"] for row in ops),
        "ops": ops,
    }
    benchmark.extra_info.update({key: value for key, value in row.items() if key != "ops"})
    results.add_step(row)
    results.add_generation(name, batch, batch / with_tokens)
