"""The whole model's interface: batches, truncation, logits, and the device-side promises of a decode step."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepseek_ops.model import DeepseekConfig, DeepseekModel
from deepseek_ops.model.config import RELEASED
from deepseek_ops.model.generate import DecodeStep, Sampler
from tests.model.conftest import FP8, V3, VARIANTS
from tests.model.support import forward, load_model, load_transformers, prompt
from tests.support import assert_rows_close

FolderOf = Callable[[DeepseekConfig], Path]


def test_the_last_logits_are_the_last_of_all_logits(checkpoint_of: FolderOf) -> None:
    model = load_model(checkpoint_of(V3), quiet=True)
    prompts = [prompt(n, seed=n) for n in (3, 1, 9)]
    cache = model.make_cache([3, 1, 9])
    batch = cache.append([cache.allocate() for _ in prompts], [3, 1, 9])
    last = model(torch.cat(prompts), batch, cache)
    assert last.shape == (3, V3.vocab_size)
    assert last.dtype == torch.float32
    for row, logits in zip(last, forward(model, prompts), strict=True):
        assert_rows_close(row, logits[-1], 1e-6)


@pytest.mark.parametrize("max_layers", [1, 2, 3])
def test_the_first_layers_of_a_model_are_a_model(max_layers: int, checkpoint_of: FolderOf) -> None:
    folder = checkpoint_of(V3)
    model = load_model(folder, max_layers=max_layers, quiet=True)
    assert model.config.num_hidden_layers == len(model.layers) == len(model.make_cache([1]).pages) == max_layers
    truncated = load_transformers(folder)
    truncated.model.layers = truncated.model.layers[:max_layers]
    truncated.config.num_hidden_layers = max_layers
    tokens = prompt(10)
    with torch.no_grad():
        want = truncated(tokens[None], use_cache=False).logits[0]
    assert_rows_close(forward(model, [tokens])[0], want, 1e-5)


def test_tied_embeddings_exist_once(checkpoint_of: FolderOf) -> None:
    model = load_model(checkpoint_of(VARIANTS["V3 with tied embeddings, all layers with experts"]), quiet=True)
    assert model.lm_head is None
    hidden = torch.randn(2, V3.hidden_size)
    assert_rows_close(model.logits(hidden), hidden @ model.embed_tokens.T, 1e-6)


@pytest.mark.parametrize(("family", "billions"), [("v2-lite", 15.706), ("v2", 235.741), ("v3", 671.026)])
def test_the_released_models_have_their_number_of_parameters(family: str, billions: float) -> None:
    with torch.device("meta"):
        model = DeepseekModel(RELEASED[family])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_other_dtypes_are_refused() -> None:
    with torch.device("meta"), pytest.raises(TypeError, match=r"bfloat16 or float32, got torch\.float16"):
        DeepseekModel(V3, dtype=torch.float16)


@pytest.mark.parametrize("config", [V3, FP8], ids=["bfloat16", "FP8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_decode_step_reads_no_value_on_the_host(
    config: DeepseekConfig, temperature: float, checkpoint_of: FolderOf
) -> None:
    """Fake tensors have no values: whatever asks for one fails. So a CUDA graph can capture the step."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = load_model(checkpoint_of(config), dtype=torch.bfloat16, quiet=True)
    model.rope_table()
    cache = model.make_cache([70, 70])
    sequences = [cache.allocate(70), cache.allocate(70)]
    cache.append(sequences, [10, 20])
    sampler = Sampler(temperature, 0.9, seeds=[0, 1], num_draws=3, device=model.device)
    step = DecodeStep(model, cache, cache.append(sequences, [1, 1]), torch.tensor([1, 2]), sampler)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for part in (step, step.batch, sampler):
            for name, x in vars(part).items():
                if isinstance(x, torch.Tensor):
                    setattr(part, name, mode.from_tensor(x))
        cache.pages = [mode.from_tensor(pages) for pages in cache.pages]
        step.run()
        step.next()
    assert step.logits is not None
    assert step.logits.shape == (2, config.vocab_size)
