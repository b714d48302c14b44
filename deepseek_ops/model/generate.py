"""Token generation: prefill the prompts, then decode one token per sequence and step.

A decode step is the move to the next position, the model and the choice of a token, over buffers that stay the same
tensors from step to step (`DecodeStep`), with nothing read on the host. So on a GPU it is captured in a CUDA graph and
replayed (`DecodeGraph`): launching a layer's kernels one by one takes the host longer than the GPU needs to run them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import Batch, PagedLatentCache
from .transformer import DeepseekModel

__all__ = [
    "BatchGeneration",
    "DecodeGraph",
    "DecodeStep",
    "Generation",
    "Sampler",
    "generate",
    "generate_batch",
    "prefill",
]


def generate(
    model: DeepseekModel,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_token_ids: Sequence[int] = (),
    prefill_chunk: int | None = None,
    use_graph: bool = True,
) -> Generation:
    """Continues one prompt.

    Args:
        model: from `load_model`.
        prompt_ids: one token or more.
        max_new_tokens: tokens to generate at most.
        temperature: 0 takes the most likely token; otherwise the logits are divided by it and a token is drawn.
        top_p: draws among the most likely tokens that together reach this probability, in (0, 1].
        seed: the same seed gives the same draws.
        stop_token_ids: tokens that end the text; they are not yielded.
        prefill_chunk: prompt tokens per forward pass; None for the whole prompt at once.
        use_graph: on a GPU, capture a decode step in a CUDA graph, where the model's can be (`can_be_captured`).

    Returns:
        An iterator over the new token ids. While it runs and after it, its attributes tell times and counts.

    Raises:
        ValueError: an argument is not as above, or prompt and new tokens exceed `max_position_embeddings`.
    """
    return Generation(
        generate_batch(
            model,
            [prompt_ids],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_token_ids=stop_token_ids,
            prefill_chunk=prefill_chunk,
            use_graph=use_graph,
        )
    )


def generate_batch(
    model: DeepseekModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_token_ids: Sequence[int] = (),
    prefill_chunk: int | None = None,
    use_graph: bool = True,
) -> BatchGeneration:
    """Continues several prompts of any lengths together; arguments as in `generate`.

    Prompt `i` draws with `seed + i`, and so as it would alone with that seed.

    Returns:
        An iterator that yields one list per step: each prompt's new token id, or None once it has ended.
    """
    return BatchGeneration(
        model,
        [list(prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        sampler=Sampler(
            temperature,
            top_p,
            seeds=[seed + i for i in range(len(prompts))],
            num_draws=max_new_tokens,
            device=model.device,
        ),
        stop_token_ids=frozenset(stop_token_ids),
        prefill_chunk=prefill_chunk,
        use_graph=use_graph,
    )


class BatchGeneration(Iterator[list[int | None]]):
    """The running generation of a batch; see `generate_batch`. Nothing is computed before the first `next`."""

    def __init__(
        self,
        model: DeepseekModel,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        sampler: Sampler,
        stop_token_ids: frozenset[int],
        prefill_chunk: int | None,
        use_graph: bool,
    ) -> None:
        _check_prompts(model, prompts, max_new_tokens, prefill_chunk)
        self.prefill_seconds = 0.0
        """Time from the start to the first tokens."""
        self.decode_seconds = 0.0
        """Time of the steps after it, without the time that the caller spends between them."""
        self.num_tokens = 0
        """Tokens yielded so far, of all sequences."""
        self.cache_bytes = 0
        """Memory of the latent cache."""
        self.finish_reasons: list[str | None] = [None] * len(prompts)
        """Per sequence "stop" after a stop token, "length" after `max_new_tokens`, None while it runs."""
        self._steps = self._run(model, prompts, max_new_tokens, sampler, stop_token_ids, prefill_chunk, use_graph)

    def __next__(self) -> list[int | None]:
        return next(self._steps)

    def _run(
        self,
        model: DeepseekModel,
        prompts: list[list[int]],
        max_new_tokens: int,
        sampler: Sampler,
        stop_token_ids: frozenset[int],
        prefill_chunk: int | None,
        use_graph: bool,
    ) -> Iterator[list[int | None]]:
        if not prompts or max_new_tokens == 0:
            self.finish_reasons = ["length"] * len(prompts)
            return

        start = time.perf_counter()
        lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        cache = model.make_cache(lengths)
        self.cache_bytes = cache.num_bytes
        sequences = [cache.allocate(length) for length in lengths]
        token_ids = sampler(prefill(model, cache, sequences, prompts, chunk=prefill_chunk))
        tokens: list[int] = token_ids.tolist()
        self.prefill_seconds = time.perf_counter() - start

        step: DecodeStep | DecodeGraph | None = None
        for num_generated in range(1, max_new_tokens + 1):
            new = self._settle(tokens, stop_token_ids, is_last=num_generated == max_new_tokens)
            if any(token is not None for token in new):
                yield new
            if None not in self.finish_reasons:
                return

            start = time.perf_counter()
            if step is None:
                batch = cache.append(sequences, [1] * len(sequences))
                step = DecodeStep(model, cache, batch, token_ids, sampler)
                token_ids = step.run()
                if use_graph and model.can_be_captured(batch):
                    step = DecodeGraph(step)
            else:
                token_ids = step.next()
            tokens = token_ids.tolist()
            self.decode_seconds += time.perf_counter() - start

    def _settle(self, tokens: list[int], stop_token_ids: frozenset[int], *, is_last: bool) -> list[int | None]:
        """What a step yields: its tokens without those of sequences that have ended; notes which end with it."""
        new: list[int | None] = []
        for i, token in enumerate(tokens):
            if self.finish_reasons[i] is None and token in stop_token_ids:
                self.finish_reasons[i] = "stop"
            if self.finish_reasons[i] is not None:
                new.append(None)
                continue
            new.append(token)
            self.num_tokens += 1
            if is_last:
                self.finish_reasons[i] = "length"
        return new


class Generation(Iterator[int]):
    """The running generation of one prompt; see `generate`. Its attributes are those of `BatchGeneration`."""

    def __init__(self, batch: BatchGeneration) -> None:
        self._batch = batch

    def __next__(self) -> int:
        (token,) = next(self._batch)
        assert token is not None
        return token

    @property
    def prefill_seconds(self) -> float:
        return self._batch.prefill_seconds

    @property
    def decode_seconds(self) -> float:
        return self._batch.decode_seconds

    @property
    def num_tokens(self) -> int:
        return self._batch.num_tokens

    @property
    def cache_bytes(self) -> int:
        return self._batch.cache_bytes

    @property
    def finish_reason(self) -> str | None:
        return self._batch.finish_reasons[0]


def prefill(
    model: DeepseekModel,
    cache: PagedLatentCache,
    sequences: Sequence[int],
    prompts: Sequence[Sequence[int]],
    *,
    chunk: int | None = None,
) -> Tensor:
    """Runs each prompt through the model, after what its sequence already holds, and returns its last logits.

    Args:
        chunk: at most so many tokens of each prompt per forward pass; None for all at once.

    Returns:
        `[b, vocab_size]` float32.
    """
    longest = max(map(len, prompts))
    chunk = longest if chunk is None else chunk
    logits: list[Tensor | None] = [None] * len(prompts)
    for start in range(0, longest, chunk):
        chunks = {i: prompt[start : start + chunk] for i, prompt in enumerate(prompts) if len(prompt) > start}
        batch = cache.append([sequences[i] for i in chunks], [len(tokens) for tokens in chunks.values()])
        token_ids = torch.tensor([token for tokens in chunks.values() for token in tokens], device=model.device)
        for i, row in zip(chunks, model(token_ids, batch, cache), strict=True):
            logits[i] = row
    return torch.stack([row for row in logits if row is not None])


@dataclass
class DecodeStep:
    """One decode step over buffers that stay the same: `token_ids`, the tensors of `batch` and the pages of `cache`."""

    model: DeepseekModel
    cache: PagedLatentCache
    batch: Batch
    """One token of each sequence, at the position of `token_ids`."""
    token_ids: Tensor
    """`[b]` int64: the tokens that go in, and after the step those that came out."""
    sampler: Sampler
    logits: Tensor | None = None
    """`[b, vocab_size]` float32 of the last step."""

    def run(self) -> Tensor:
        """Runs the model on `token_ids` at the batch's position and replaces them by the next ones."""
        self.logits = self.model(self.token_ids, self.batch, self.cache)
        return self.token_ids.copy_(self.sampler(self.logits))

    def next(self) -> Tensor:
        """Moves on to the next position and runs there."""
        self.cache.count_advance(self.batch)
        return self.run_next()

    def run_next(self) -> Tensor:
        """The device's half of `next`: reads nothing on the host, so that it can be captured."""
        self.batch.advance()
        return self.run()


class DecodeGraph:
    """A `DecodeStep` whose `next` is replayed from a CUDA graph: one launch, whatever the sequences have grown to.

    The graph knows the buffers by their addresses, and a replay reads what they hold then. So it is void once they are
    others, as after `PagedLatentCache.grow`. The first call runs as it is: what libraries set up when they are first
    used cannot be captured.
    """

    def __init__(self, step: DecodeStep) -> None:
        self.step = step
        self.is_warm = False
        self.replay: Callable[[], None] | None = None

    def next(self) -> Tensor:
        """As `DecodeStep.next`; `step.logits` are overwritten by each replay."""
        self.step.cache.count_advance(self.step.batch)
        if not self.is_warm:
            self.is_warm = True
            return self.step.run_next()
        if self.replay is None:
            self.replay = capture(self.step.run_next, self.step.model.device)
        self.replay()
        return self.step.token_ids


def capture(function: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Records what `function` launches on `device`, without running it; returns what launches all of it at once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            function()
    return graph.replay


class Sampler:
    """Chooses tokens from logits: the most likely one, or one drawn at `temperature` from the top `top_p`.

    The random numbers are drawn ahead on the CPU, one stream per sequence, so that they depend on nothing but the seed:
    not on the device, nor on what else is in the batch. Which of them are next is counted on the device, so that a
    captured step draws new ones at each replay.
    """

    def __init__(
        self, temperature: float, top_p: float, *, seeds: Sequence[int], num_draws: int, device: torch.device
    ) -> None:
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        self.temperature = temperature
        self.top_p = top_p
        self.uniforms: Tensor | None = None
        """`[num_draws, b]` float32 in [0, 1)."""
        self.num_drawn = torch.zeros(1, dtype=torch.int64, device=device)
        """Rows of `uniforms` that are used up."""
        if temperature > 0 and seeds:
            streams = [torch.rand(num_draws, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            self.uniforms = torch.stack(streams, dim=1).to(device)

    def __call__(self, logits: Tensor) -> Tensor:
        """`[b, vocab_size]` float32 to `[b]` int64; `num_draws` times at most."""
        if self.uniforms is None:
            return logits.argmax(dim=-1)
        uniform = self.uniforms.index_select(0, self.num_drawn).squeeze(0)
        self.num_drawn += 1
        return sample_top_p(logits / self.temperature, self.top_p, uniform)


def sample_top_p(logits: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """Draws from the softmax, cut off to its most likely tokens that together reach `top_p`, by inverse CDF.

    Args:
        logits: `[b, vocab_size]` float32.
        top_p: in (0, 1]; the most likely token is always kept.
        uniform: `[b]` float32 in [0, 1), one random number per row.

    Returns:
        `[b]` int64.
    """
    probs, token_ids = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    reached = probs.cumsum(dim=-1)
    num_kept = (reached - probs < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    kept_mass = reached.gather(1, num_kept - 1)
    drawn = torch.searchsorted(reached, uniform.unsqueeze(1) * kept_mass, right=True)
    return token_ids.gather(1, torch.minimum(drawn, num_kept - 1)).squeeze(1)


def _check_prompts(
    model: DeepseekModel, prompts: list[list[int]], max_new_tokens: int, prefill_chunk: int | None
) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk must be 1 or more, got {prefill_chunk}")
    limit, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: it must have one token or more")
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens: with {max_new_tokens} new ones that exceeds the model's {limit}"
            )
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise ValueError(f"prompt {i} has the token {token}: it must be in 0..{vocab_size - 1}")
