"""What the model's tests share: one forward pass over fresh sequences, transformers, and the start of a generation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deepseek_ops.model
from deepseek_ops.model import DeepseekModel
from deepseek_ops.model.generate import DecodeStep, Sampler, prefill

load_model = functools.partial(deepseek_ops.model.load_model, device="cpu")
"""On the CPU wherever the tests run: transformers is beside it, in float32. test_cuda.py compares the GPU with it."""


def forward(model: DeepseekModel, prompts: Sequence[Tensor], *, chunk: int | None = None) -> list[Tensor]:
    """Logits of every token of each prompt, all prompts in one batch, prefilled in chunks."""
    cache = model.make_cache([len(p) for p in prompts])
    sequences = [cache.allocate() for _ in prompts]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    longest = max(len(p) for p in prompts)
    chunk = chunk or longest
    for start in range(0, longest, chunk):
        chunks = {i: p[start : start + chunk] for i, p in enumerate(prompts) if len(p) > start}
        batch = cache.append([sequences[i] for i in chunks], [len(c) for c in chunks.values()])
        rows = model(torch.cat(list(chunks.values())).to(model.device), batch, cache, all_logits=True)
        for i, part in zip(chunks, rows.split([len(c) for c in chunks.values()]), strict=True):
            logits[i].append(part)
    return [torch.cat(parts) for parts in logits]


def load_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The same checkpoint in transformers, with its plainest attention."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = "DeepseekV2ForCausalLM" if "deepseek_v2" in (folder / "config.json").read_text() else "DeepseekV3ForCausalLM"
    return getattr(transformers, name).from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def prompt(length: int, vocab_size: int = 199, seed: int = 0) -> Tensor:
    """`length` random token ids."""
    return torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


PROMPTS = [prompt(12).tolist(), prompt(61).tolist(), [7]]
"""The second crosses the end of a page after a few steps."""


def first_step(model: DeepseekModel, num_new: int, *, temperature: float = 0.0) -> DecodeStep:
    """A step that has run at the first position after each of PROMPTS, with room for `num_new` tokens in all."""
    lengths = [len(p) + num_new for p in PROMPTS]
    cache = model.make_cache(lengths)
    sequences = [cache.allocate(length) for length in lengths]
    seeds = range(len(PROMPTS))
    sampler = Sampler(temperature, 0.9, seeds=seeds, num_draws=num_new + 1, device=model.device)
    token_ids = sampler(prefill(model, cache, sequences, PROMPTS))
    step = DecodeStep(model, cache, cache.append(sequences, [1] * len(PROMPTS)), token_ids, sampler)
    step.run()
    return step
