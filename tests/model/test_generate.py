"""Generation: stopping, sampling, counting, and the buffers of the decode step."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_ops.model import DeepseekConfig, DeepseekModel, generate, generate_batch
from deepseek_ops.model.generate import DecodeGraph, DecodeStep, Sampler, sample_top_p
from deepseek_ops.model.tiny import write_tiny
from tests.model.conftest import FP8, V3, VARIANTS
from tests.model.support import PROMPTS, first_step, load_model, prompt

GENERATE = importlib.import_module("deepseek_ops.model.generate")
"""The module, whose name in its package is that of the function."""
FolderOf = Callable[[DeepseekConfig], Path]
TOKENS = prompt(12).tolist()


@pytest.fixture
def model(checkpoint_of: FolderOf) -> DeepseekModel:
    return load_model(checkpoint_of(VARIANTS["V3 without experts"]), quiet=True)


def test_stop_tokens_end_the_text_and_are_not_yielded(model: DeepseekModel) -> None:
    tokens = list(generate(model, TOKENS, max_new_tokens=8))
    assert len(tokens) == 8
    stop = next(i for i in range(1, 8) if tokens[i] not in tokens[:i])
    generation = generate(model, TOKENS, max_new_tokens=8, stop_token_ids=[tokens[stop]])
    assert list(generation) == tokens[:stop]
    assert generation.finish_reason == "stop"
    assert generation.num_tokens == stop


def test_statistics_count_what_happened(model: DeepseekModel) -> None:
    generation = generate(model, TOKENS, max_new_tokens=5)
    assert (generation.num_tokens, generation.prefill_seconds, generation.finish_reason) == (0, 0.0, None)
    next(generation)
    assert generation.num_tokens == 1
    assert generation.prefill_seconds > 0
    assert generation.decode_seconds == 0
    list(generation)
    assert generation.num_tokens == 5
    assert generation.decode_seconds > 0
    assert generation.finish_reason == "length"
    config = model.config
    assert generation.cache_bytes == config.num_hidden_layers * 64 * (config.kv_lora_rank + config.qk_rope_head_dim) * 4


@pytest.mark.parametrize("max_new_tokens", [0, 1, 2])
def test_no_more_tokens_than_asked_for(max_new_tokens: int, model: DeepseekModel) -> None:
    assert len(list(generate(model, TOKENS, max_new_tokens=max_new_tokens))) == max_new_tokens


def test_sequences_of_a_batch_end_each_for_itself(model: DeepseekModel) -> None:
    prompts = [TOKENS, TOKENS[:5], TOKENS[:1]]
    alone = [list(generate(model, p, max_new_tokens=6)) for p in prompts]
    stop = alone[0][2]
    generation = generate_batch(model, prompts, max_new_tokens=6, stop_token_ids=[stop])
    steps = list(generation)
    for i, tokens in enumerate(alone):
        end = tokens.index(stop) if stop in tokens else 6
        assert [step[i] for step in steps if step[i] is not None] == tokens[:end]
        assert generation.finish_reasons[i] == ("stop" if stop in tokens else "length")
    assert generation.num_tokens == sum(token is not None for step in steps for token in step)
    assert list(generate_batch(model, [], max_new_tokens=6)) == []


def test_the_same_seed_draws_the_same_and_another_differs(model: DeepseekModel) -> None:
    def draw(seed: int) -> list[int]:
        return list(generate(model, TOKENS, max_new_tokens=12, temperature=1.5, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_prompt_draws_in_a_batch_as_it_does_alone(model: DeepseekModel) -> None:
    prompts = [TOKENS, TOKENS[:7]]
    steps = list(generate_batch(model, prompts, max_new_tokens=10, temperature=1.0, top_p=0.9, seed=5))
    for i, tokens in enumerate(prompts):
        alone = generate(model, tokens, max_new_tokens=10, temperature=1.0, top_p=0.9, seed=5 + i)
        assert [step[i] for step in steps] == list(alone)


def test_draws_follow_the_probabilities() -> None:
    probs = torch.tensor([0.5, 0.1, 0.3, 0.1])
    n = 20_000
    uniform = (torch.arange(n) + 0.5) / n
    drawn = sample_top_p(probs.log().expand(n, 4), 1.0, uniform)
    frequencies = torch.bincount(drawn, minlength=4) / n
    torch.testing.assert_close(frequencies, probs, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, {0}), (0.5, {0}), (0.51, {0, 2}), (0.85, {0, 2, 1}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: set[int]) -> None:
    probs = torch.tensor([0.5, 0.125, 0.25, 0.125])
    uniform = torch.linspace(0, 1 - 2**-24, 1000)
    drawn = sample_top_p(probs.log().expand(1000, 4), top_p, uniform)
    assert set(drawn.tolist()) == kept


def test_temperature_divides_the_logits_and_zero_takes_the_best() -> None:
    logits = torch.tensor([[math.log(0.6), math.log(0.4)]])
    n = 4000
    for temperature, share in ((1.0, 0.6), (0.5, 0.36 / (0.36 + 0.16))):
        sampler = Sampler(temperature, 1.0, seeds=[0], num_draws=n, device=torch.device("cpu"))
        drawn = torch.stack([sampler(logits) for _ in range(n)])
        assert (drawn == 0).float().mean() == pytest.approx(share, abs=0.03)
    greedy = Sampler(0.0, 1.0, seeds=[0], num_draws=1, device=torch.device("cpu"))
    assert greedy(logits).tolist() == [0]


@pytest.mark.parametrize("family", ["v2-lite", "v2", "v3", "v3.1"])
def test_toy_checkpoints_of_every_family_generate(family: str, tmp_path: Path) -> None:
    write_tiny(tmp_path, family, num_hidden_layers=2)
    texts = [
        list(generate(load_model(tmp_path, attn=attn, dtype=dtype, quiet=True), TOKENS, max_new_tokens=3))
        for attn in ("absorbed", "expanded")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert [len(text) for text in texts] == [3] * 4
    assert texts[0] == texts[2]


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunked_prefill_generates_the_same(chunk: int, model: DeepseekModel) -> None:
    want = list(generate(model, TOKENS, max_new_tokens=4))
    assert list(generate(model, TOKENS, max_new_tokens=4, prefill_chunk=chunk)) == want


def tensors_of(step: DecodeStep) -> dict[str, torch.Tensor]:
    """What a captured step knows by its address, but for the weights."""
    pages = {f"layer {i}": x for i, x in enumerate(step.cache.pages)}
    everything = {**vars(step.batch), **vars(step.sampler), **pages, "token_ids": step.token_ids}
    return {name: x for name, x in everything.items() if isinstance(x, torch.Tensor)}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decode_steps_reuse_their_buffers(temperature: float, checkpoint_of: FolderOf) -> None:
    step = first_step(load_model(checkpoint_of(V3), quiet=True), 8, temperature=temperature)
    before = {name: x.data_ptr() for name, x in tensors_of(step).items()}
    for _ in range(4):
        step.next()
        assert {name: x.data_ptr() for name, x in tensors_of(step).items()} == before
    assert step.cache.length(step.batch.sequences[1]) == 66


@pytest.mark.parametrize("config", [V3, FP8], ids=["float32", "FP8"])
def test_a_step_over_its_buffers_gives_the_bits_of_a_step_with_new_ones(
    config: DeepseekConfig, checkpoint_of: FolderOf
) -> None:
    """Greedy: tokens and logits, as long as a batch that is made anew for each step gives them."""
    model = load_model(checkpoint_of(config), quiet=True)
    step, other = first_step(model, 12), first_step(model, 12)
    token_ids = other.token_ids.clone()
    for _ in range(10):
        logits = model(token_ids, other.cache.append(other.batch.sequences, [1] * len(PROMPTS)), other.cache)
        token_ids = logits.argmax(dim=-1)
        assert torch.equal(step.next(), token_ids)
        assert step.logits is not None
        assert torch.equal(step.logits, logits)


def test_a_graph_is_captured_once_after_a_step_and_replayed(
    model: DeepseekModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a capture that only remembers what to run."""
    captured = []

    def remember(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
        captured.append(device)
        return function

    monkeypatch.setattr(GENERATE, "capture", remember)
    step, graph = first_step(model, 6), DecodeGraph(first_step(model, 6))
    for i in range(6):
        assert torch.equal(graph.next(), step.next())
        assert captured == ([model.device] if i else [])
    assert graph.step.cache.length(graph.step.batch.sequences[0]) == len(PROMPTS[0]) + 7


def test_a_graph_is_used_where_the_step_can_be_captured_and_it_is_wanted(
    model: DeepseekModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures = []
    monkeypatch.setattr(GENERATE, "capture", lambda function, device: captures.append(device) or function)
    want = list(generate(model, TOKENS, max_new_tokens=6))
    assert not captures, "there is no graph on a CPU"
    monkeypatch.setattr(DeepseekModel, "can_be_captured", lambda self, batch: True)
    assert list(generate(model, TOKENS, max_new_tokens=6)) == want
    assert len(captures) == 1
    assert list(generate(model, TOKENS, max_new_tokens=6, use_graph=False)) == want
    assert len(captures) == 1


@pytest.mark.parametrize(
    ("prompt_ids", "options", "message"),
    [
        ([], {}, "prompt 0 is empty"),
        ([199], {}, r"the token 199: it must be in 0\.\.198"),
        ([-1], {}, "the token -1"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens must be 0 or more"),
        ([1], {"max_new_tokens": 1024}, "1 tokens: with 1024 new ones that exceeds the model's 1024"),
        ([1], {"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ([1], {"temperature": math.nan}, "temperature must be 0 or more"),
        ([1], {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ([1], {"top_p": 1.1}, "top_p must be"),
        ([1], {"prefill_chunk": 0}, "prefill_chunk must be 1 or more"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_before_anything_runs(
    prompt_ids: list[int], options: dict[str, Any], message: str, model: DeepseekModel
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, prompt_ids, **({"max_new_tokens": 1} | options))
