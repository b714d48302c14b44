"""Tokens per second of the model layer, on a toy checkpoint: what a step costs beside its kernels."""

from __future__ import annotations

import pytest

from benchmarks.shapes import DEVICE, GPU
from deepseek_ops.model import generate_batch, load_model
from deepseek_ops.model.tiny import write_tiny

NEW_TOKENS = 32 if GPU else 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny(folder)
    return load_model(folder, device=DEVICE)


@pytest.mark.parametrize("batch", [1, 4])
def test_generation(benchmark, results, model, batch: int):
    prompts = [list(range(1 + i, 17 + i)) for i in range(batch)]
    num_tokens, seconds = [], []

    def run() -> None:
        generation = generate_batch(model, prompts, max_new_tokens=NEW_TOKENS)
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
