"""The multi-token prediction module against one put together from transformers' own decoder layer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deepseek_ops.model import DeepseekConfig
from deepseek_ops.model.mtp import draft
from tests.model.conftest import VARIANTS
from tests.model.support import load_model, load_transformers, prompt
from tests.support import assert_rows_close

FolderOf = Callable[[DeepseekConfig], Path]
CONFIG = VARIANTS["V3 with MTP, two dense layers"]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt() * weight


def reference_logits(folder: Path, tokens: Tensor) -> Tensor:
    """The module's logits at every position but the last: a decoder layer of transformers behind the two norms."""
    layer_idx = CONFIG.num_hidden_layers
    prefix = f"model.layers.{layer_idx}."
    main = load_transformers(folder)
    weights = {n.removeprefix(prefix): x for n, x in load_file(folder / "model.safetensors").items() if prefix in n}
    block = type(main.model.layers[-1])(main.config, layer_idx).eval()
    state = {n: x for n, x in weights.items() if ".experts." not in n and n in block.state_dict()}
    experts = [f"mlp.experts.{e}." for e in range(CONFIG.n_routed_experts or 0)]
    state["mlp.experts.gate_up_proj"] = torch.stack(
        [torch.cat([weights[f"{e}gate_proj.weight"], weights[f"{e}up_proj.weight"]]) for e in experts]
    )
    state["mlp.experts.down_proj"] = torch.stack([weights[f"{e}down_proj.weight"] for e in experts])
    state |= {n: x for n, x in weights.items() if "shared_experts" in n}
    block.load_state_dict(state)
    hidden = main.model(tokens[None]).last_hidden_state[0, :-1]
    embedded = main.model.embed_tokens(tokens[1:])
    x = torch.cat([norm(embedded, weights["enorm.weight"]), norm(hidden, weights["hnorm.weight"])], dim=-1)
    x = (x @ weights["eh_proj.weight"].T)[None]
    t = x.shape[1]
    mask = torch.full((t, t), -torch.inf).triu(1)[None, None]
    position_ids = torch.arange(t)[None]
    x = block(x, attention_mask=mask, position_embeddings=main.model.rotary_emb(x, position_ids))[0]
    return main.lm_head(norm(x, weights["shared_head.norm.weight"]))


@pytest.mark.parametrize("attn", ["expanded", "absorbed"])
@pytest.mark.parametrize("chunk", [20, 7])
def test_drafts_are_those_of_the_module_behind_the_main_model(attn: str, chunk: int, checkpoint_of: FolderOf) -> None:
    folder = checkpoint_of(CONFIG)
    tokens = prompt(21)
    with torch.no_grad():
        want = reference_logits(folder, tokens)
    model = load_model(folder, attn=attn, mtp=True, quiet=True)
    cache = model.make_cache([20])
    assert len(cache.pages) == CONFIG.num_hidden_layers + 1
    sequence = cache.allocate()
    got = []
    for start in range(0, 20, chunk):
        now = tokens[start : min(start + chunk, 20)]
        batch = cache.append([sequence], [len(now)])
        hidden = model.hidden_states(now, batch, cache)
        logits, drafted = draft(model, hidden, tokens[start + 1 : start + 1 + len(now)], batch, cache)
        assert drafted.shape == hidden.shape
        got.append(logits)
    assert_rows_close(torch.cat(got), want, 1e-5)
