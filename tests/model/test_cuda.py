"""The model on a GPU against the same model on the CPU, which is held to transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import deepseek_ops.model
from deepseek_ops.model import DeepseekConfig, generate
from deepseek_ops.model.linear import Fp8Linear
from tests.model.conftest import FP8, VARIANTS
from tests.model.support import forward, load_model, prompt
from tests.support import FP32_LIMIT, assert_rows_close

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
