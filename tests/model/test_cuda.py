"""The model on a GPU against the same model on the CPU, which is held to transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import deepseek_ops.model
from deepseek_ops.model import DeepseekConfig, generate
from deepseek_ops.model.generate import DecodeGraph
from deepseek_ops.model.linear import Fp8Linear
from deepseek_ops.model.tiny import tiny_config
from tests.model.conftest import FP8, VARIANTS
from tests.model.support import first_step, forward, load_model, prompt
from tests.support import FP32_LIMIT, assert_rows_close, bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

PROMPT = prompt(65)


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def on_gpu(folder: Path, **options: object) -> deepseek_ops.model.DeepseekModel:
    return deepseek_ops.model.load_model(folder, device="cuda", quiet=True, **options)


@pytest.mark.parametrize("attn", ["absorbed", "expanded"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_cpu(name: str, attn: str, checkpoint_of: Callable[[DeepseekConfig], Path]) -> None:
    folder = checkpoint_of(VARIANTS[name])
    (got,) = forward(on_gpu(folder, attn=attn), [PROMPT])
    (want,) = forward(load_model(folder, attn=attn, quiet=True), [PROMPT])
    assert_rows_close(got.cpu(), want, 1e-4)


@pytest.mark.parametrize("name", ["V2-Lite", "V3"])
def test_greedy_text_is_that_of_the_cpu(name: str, checkpoint_of: Callable[[DeepseekConfig], Path]) -> None:
    folder = checkpoint_of(VARIANTS[name])
    got = list(generate(on_gpu(folder), PROMPT[:40].tolist(), max_new_tokens=32))
    assert got == list(generate(load_model(folder, quiet=True), PROMPT[:40].tolist(), max_new_tokens=32))


def test_fp8_layers_are_those_of_the_cpu(checkpoint_of: Callable[[DeepseekConfig], Path]) -> None:
    """Layer by layer on the same input, which both quantize to the same bits: no earlier rounding is in the way."""
    folder = checkpoint_of(FP8)
    layers = {name: layer for name, layer in on_gpu(folder).named_modules() if isinstance(layer, Fp8Linear)}
    assert layers
    for name, layer in load_model(folder, quiet=True).named_modules():
        if name in layers and len(layer.shape) == 2:
            x = torch.randn(70, layer.in_features)
            assert_rows_close(layers[name](x.cuda()).cpu(), layer(x), FP32_LIMIT)


def test_an_fp8_checkpoint_gives_about_the_logits_of_the_cpu(checkpoint_of: Callable[[DeepseekConfig], Path]) -> None:
    """About: a row moves where a value rounds the other way, or a token goes to another expert."""
    folder = checkpoint_of(FP8)
    (got,) = forward(on_gpu(folder), [PROMPT])
    (want,) = forward(load_model(folder, quiet=True), [PROMPT])
    assert got.isfinite().all()
    errors = torch.linalg.vector_norm(got.cpu().double() - want.double(), dim=-1) / want.double().norm(dim=-1)
    assert errors.median() <= 0.1


DECODED = {
    "V3 in FP8": tiny_config("v3", real_mla=True),
    "V2-Lite in bfloat16": tiny_config("v2-lite", real_mla=True),
    "V3 in FP8, other extents than the kernels'": FP8,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", DECODED)
def test_a_decode_step_waits_for_nothing(
    name: str, temperature: float, checkpoint_of: Callable[[DeepseekConfig], Path]
) -> None:
    step = first_step(on_gpu(checkpoint_of(DECODED[name]), dtype=torch.bfloat16), 4, temperature=temperature)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.next()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", DECODED)
def test_a_replayed_graph_gives_the_bits_of_eager_steps(
    name: str, temperature: float, checkpoint_of: Callable[[DeepseekConfig], Path]
) -> None:
    """Tokens, logits and in the end the cache, while three sequences grow over the ends of several pages."""
    num_steps = 400
    model = on_gpu(checkpoint_of(DECODED[name]), dtype=torch.bfloat16)
    eager = first_step(model, num_steps + 1, temperature=temperature)
    graph = DecodeGraph(first_step(model, num_steps + 1, temperature=temperature))
    for i in range(num_steps):
        assert torch.equal(graph.next(), eager.next()), f"step {i}"
        assert graph.step.logits is not None
        assert eager.logits is not None
        assert torch.equal(bits(graph.step.logits), bits(eager.logits)), f"step {i}"
    assert graph.replay is not None
    for got, want in zip(graph.step.cache.pages, eager.cache.pages, strict=True):
        assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("name", DECODED)
def test_generation_is_the_same_with_a_graph_and_without(
    name: str, checkpoint_of: Callable[[DeepseekConfig], Path]
) -> None:
    model = on_gpu(checkpoint_of(DECODED[name]), dtype=torch.bfloat16)
    options = {"max_new_tokens": 64, "temperature": 0.7, "top_p": 0.9, "seed": 3}
    with_graph = list(generate(model, PROMPT.tolist(), **options))
    assert with_graph == list(generate(model, PROMPT.tolist(), use_graph=False, **options))
    assert with_graph == list(generate(model, PROMPT.tolist(), **options)), "the next graph is another one's"


def test_experts_in_float32_generate_without_a_graph(checkpoint_of: Callable[[DeepseekConfig], Path]) -> None:
    model = on_gpu(checkpoint_of(VARIANTS["V3"]), dtype=torch.float32)
    assert len(list(generate(model, PROMPT.tolist(), max_new_tokens=4))) == 4
