"""The model on a GPU against the same model on the CPU, which is held to transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import deepseek_ops.model
from deepseek_ops.model import DeepseekConfig, generate
from tests.model.conftest import FP8, VARIANTS
from tests.model.support import forward, load_model, prompt
from tests.support import assert_rows_close

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


def test_an_fp8_checkpoint_runs_through_the_kernels(checkpoint_of: Callable[[DeepseekConfig], Path]) -> None:
    """Only as close as FP8 allows: a value on the other side of a rounding boundary moves its row by much."""
    folder = checkpoint_of(FP8)
    (got,) = forward(on_gpu(folder), [PROMPT])
    (want,) = forward(load_model(folder, quiet=True), [PROMPT])
    assert got.isfinite().all()
    errors = torch.linalg.vector_norm(got.cpu().double() - want.double(), dim=-1) / want.double().norm(dim=-1)
    assert errors.median() <= 3e-2
    assert errors.max() <= 0.3
