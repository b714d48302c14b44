"""Our model against transformers', and every path of ours against every other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deepseek_ops
from deepseek_ops.model import DeepseekConfig, DeepseekModel, generate, generate_batch
from deepseek_ops.model import linear as linear_module
from deepseek_ops.model.checkpoint import write_checkpoint
from deepseek_ops.model.linear import Fp8Linear, Linear
from tests.model.conftest import FP8, V2, V3, VARIANTS
from tests.model.support import forward, load_model, load_transformers, prompt
from tests.support import assert_rows_close, relative_error

FolderOf = Callable[[DeepseekConfig], Path]
PROMPT = prompt(70)
"""More than one page."""


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> DeepseekConfig:
    return VARIANTS[request.param]


_TRANSFORMERS: dict[DeepseekConfig, Any] = {}


def transformers_of(folder: Path, config: DeepseekConfig) -> Any:
    if config not in _TRANSFORMERS:
        _TRANSFORMERS[config] = load_transformers(folder)
    return _TRANSFORMERS[config]


# ------------------------------------------------------------------------------------------------ against transformers


@pytest.mark.parametrize("attn", ["expanded", "absorbed"])
def test_logits_are_those_of_transformers(variant: DeepseekConfig, attn: Any, checkpoint_of: FolderOf) -> None:
    folder = checkpoint_of(variant)
    with torch.no_grad():
        want = transformers_of(folder, variant)(PROMPT[None]).logits[0]
    (got,) = forward(load_model(folder, attn=attn, quiet=True), [PROMPT])
    assert_rows_close(got, want, 1e-5)


def test_greedy_tokens_are_those_of_transformers(variant: DeepseekConfig, checkpoint_of: FolderOf) -> None:
    """Each of ours is transformers' most likely token after all that came before: its own greedy text, at one pass."""
    folder = checkpoint_of(variant)
    got = list(generate(load_model(folder, quiet=True), PROMPT[:40].tolist(), max_new_tokens=32))
    with torch.no_grad():
        logits = transformers_of(folder, variant)(torch.tensor([*PROMPT[:40], *got])[None]).logits[0]
    assert len(got) == 32
    assert got == logits[39:-1].argmax(-1).tolist()


@pytest.mark.parametrize("name", ["V2", "V3"])
def test_generated_tokens_are_those_that_transformers_generates(name: str, checkpoint_of: FolderOf) -> None:
    folder = checkpoint_of(VARIANTS[name])
    with torch.no_grad():
        want = transformers_of(folder, VARIANTS[name]).generate(
            PROMPT[None, :40], max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, 40:]
    got = list(generate(load_model(folder, quiet=True), PROMPT[:40].tolist(), max_new_tokens=32))
    assert got == want.tolist()


def test_bfloat16_is_as_close_to_float32_as_transformers_is(checkpoint_of: FolderOf) -> None:
    config = replace(VARIANTS["V3"], torch_dtype="bfloat16")
    folder = checkpoint_of(config)
    with torch.no_grad():
        exact = load_transformers(folder)(PROMPT[None]).logits[0]
        theirs = load_transformers(folder, torch.bfloat16)(PROMPT[None]).logits[0]
    (ours,) = forward(load_model(folder, quiet=True), [PROMPT])
    assert relative_error(ours, exact) <= 1.2 * relative_error(theirs, exact)


def test_norm_topk_prob_holds_in_v2_where_transformers_ignores_it(checkpoint_of: FolderOf) -> None:
    """DeepSeek's definition: with the flag a token's weights sum to the scaling factor. No release of V2 sets it."""
    plain, normed = (load_model(checkpoint_of(replace(V2, norm_topk_prob=n)), quiet=True) for n in (False, True))
    (without,), (with_norm,) = forward(plain, [PROMPT]), forward(normed, [PROMPT])
    assert relative_error(with_norm, without) > 0.01
    gate = normed.layers[1].mlp.gate
    weights, _ = gate(torch.randn(5, V2.hidden_size))
    torch.testing.assert_close(weights.sum(-1), torch.full((5,), V2.routed_scaling_factor))


# ---------------------------------------------------------------------------------------------------- the forms agree


@pytest.mark.parametrize("chunk", [None, 1, 30], ids=["whole", "token by token", "in chunks"])
def test_absorbed_equals_expanded(chunk: int | None, checkpoint_of: FolderOf) -> None:
    expanded, absorbed = (load_model(checkpoint_of(V3), attn=a, quiet=True) for a in ("expanded", "absorbed"))
    (want,), (got,) = forward(expanded, [PROMPT], chunk=chunk), forward(absorbed, [PROMPT], chunk=chunk)
    assert_rows_close(got, want, 1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 63, 64, 65])
@pytest.mark.parametrize("attn", ["expanded", "absorbed", "auto"])
def test_chunked_prefill_equals_whole(attn: Any, chunk: int, checkpoint_of: FolderOf) -> None:
    model = load_model(checkpoint_of(V3), attn=attn, quiet=True)
    (want,), (got,) = forward(model, [PROMPT]), forward(model, [PROMPT], chunk=chunk)
    assert_rows_close(got, want, 1e-5)


@pytest.mark.parametrize("attn", ["expanded", "absorbed", "auto"])
def test_a_batch_of_unequal_prompts_equals_each_alone(attn: Any, checkpoint_of: FolderOf) -> None:
    model = load_model(checkpoint_of(V3), attn=attn, quiet=True)
    prompts = [prompt(n, seed=n) for n in (1, 63, 64, 65, 5, 130)]
    for chunk in (None, 50):
        for got, alone in zip(forward(model, prompts, chunk=chunk), prompts, strict=True):
            assert_rows_close(got, forward(model, [alone])[0], 1e-5)


def test_a_batch_generates_what_each_prompt_generates_alone(checkpoint_of: FolderOf) -> None:
    model = load_model(checkpoint_of(V3), quiet=True)
    prompts = [prompt(n, seed=n).tolist() for n in (1, 60, 64, 7)]
    steps = list(generate_batch(model, prompts, max_new_tokens=10))
    for i, alone in enumerate(prompts):
        assert [step[i] for step in steps] == list(generate(model, alone, max_new_tokens=10))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128])
def test_decoding_across_a_page_boundary_equals_prefill(length: int, checkpoint_of: FolderOf) -> None:
    model = load_model(checkpoint_of(V3), quiet=True)
    tokens = prompt(length, seed=length).tolist()
    new = list(generate(model, tokens, max_new_tokens=3))
    (logits,) = forward(model, [torch.tensor(tokens + new)])
    assert new == logits[length - 1 : -1].argmax(-1).tolist()


# ------------------------------------------------------------------------------------------------------------------ FP8


def dequantized_twin(folder: Path, into: Path) -> Path:
    """The FP8 checkpoint's values as a float32 checkpoint, dequantized by plain indexing."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        scale, weight = tensors.pop(name), name.removesuffix("_scale_inv")
        row, column = (torch.arange(extent) // 128 for extent in tensors[weight].shape)
        tensors[weight] = tensors[weight].float() * scale[row][:, column]
    config = replace(FP8, quantization=None)
    write_checkpoint(into, config.to_dict(), [{n: x.contiguous() for n, x in tensors.items()}])
    return into


def test_an_fp8_checkpoint_in_float_is_its_dequantized_twin(checkpoint_of: FolderOf, tmp_path: Path) -> None:
    """Ragged blocks included. transformers refuses such a checkpoint or scales it wrongly, so it gets the twin."""
    folder = checkpoint_of(FP8)
    twin = dequantized_twin(folder, tmp_path)
    (ours,) = forward(load_model(folder, gemm="bf16", quiet=True), [PROMPT])
    (ours_of_twin,) = forward(load_model(twin, quiet=True), [PROMPT])
    assert torch.equal(ours, ours_of_twin)
    with torch.no_grad():
        theirs = load_transformers(twin)(PROMPT[None]).logits[0]
    assert_rows_close(ours, theirs, 1e-5)


def quantize_inputs(model: DeepseekModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a float model round what enters its layers as an FP8 model does: the same math, without the FP8 GEMM."""

    def rounded(x: Tensor) -> Tensor:
        return deepseek_ops.per_token_cast_from_fp8(*deepseek_ops.per_token_cast_to_fp8(x), out_dtype=x.dtype)

    for name, module in model.named_modules():
        if isinstance(module, Linear) and not name.endswith(("kv_b_proj", "eh_proj")):
            module.register_forward_pre_hook(lambda module, args: (rounded(args[0]),))
    plain = linear_module.grouped_linear
    monkeypatch.setattr(linear_module, "grouped_linear", lambda x, *rest: plain(rounded(x), *rest))


def test_the_fp8_path_is_the_float_path_on_rounded_inputs(
    checkpoint_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the math is the same the results are, but for inputs that fall on the other side of a rounding boundary.

    Such a one moves by a sixteenth of its value, so single rows may be off; a wrong scale or place would move all.
    """
    folder = checkpoint_of(FP8)
    in_fp8 = load_model(folder, quiet=True)
    in_float = load_model(folder, gemm="bf16", quiet=True)
    (got,) = forward(in_fp8, [PROMPT])
    (exact,) = forward(in_float, [PROMPT])
    quantize_inputs(in_float, monkeypatch)
    (want,) = forward(in_float, [PROMPT])
    errors = relative_error(got, want, dim=-1)
    assert errors.median() < 1e-5
    assert errors.max() < 0.1
    assert 0.005 < relative_error(want, exact) < 0.3  # what FP8 itself costs


def test_only_the_projections_are_in_fp8(checkpoint_of: FolderOf) -> None:
    model = load_model(checkpoint_of(FP8), mtp=True, quiet=True)
    in_fp8 = {n.split(".", 2)[2] for n, m in model.named_modules() if isinstance(m, Fp8Linear) and n[0] == "l"}
    assert in_fp8 == {
        *("self_attn.qkv_a_proj", "self_attn.q_b_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        *("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        *("mlp.shared_experts.gate_up_proj", "mlp.shared_experts.down_proj"),
    }


@pytest.mark.parametrize("attn", ["expanded", "absorbed"])
def test_an_fp8_cache_costs_what_its_rounding_costs(attn: Any, checkpoint_of: FolderOf) -> None:
    config = replace(V3, kv_lora_rank=512, qk_rope_head_dim=64, num_hidden_layers=2)
    folder = checkpoint_of(config)
    tokens = prompt(66)
    plain = load_model(folder, attn=attn, quiet=True)
    packed = load_model(folder, attn=attn, cache_dtype=torch.float8_e4m3fn, quiet=True)
    (want,), (got,), (in_chunks,) = (
        forward(plain, [tokens]),
        forward(packed, [tokens]),
        forward(packed, [tokens], chunk=20),
    )
    assert 1e-3 < relative_error(got, want) < 0.1
    assert_rows_close(in_chunks, got, 2e-3)  # a chunk sees its own latents as later chunks see them
