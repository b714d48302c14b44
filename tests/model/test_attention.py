"""One layer's attention against the formula of the paper in float64, and the choice between its two forms."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deepseek_ops import rope_cos_sin
from deepseek_ops.model import DeepseekConfig, PagedLatentCache
from deepseek_ops.model import attention as attention_module
from deepseek_ops.model.attention import Attention, absorbed_is_cheaper
from deepseek_ops.model.cache import Batch
from deepseek_ops.model.config import RELEASED
from tests.model.conftest import V3, VARIANTS
from tests.support import BF16_LIMIT, assert_rows_close


def random_attention(config: DeepseekConfig, dtype: torch.dtype = torch.float32) -> Attention:
    layer = Attention(config, gemm="bf16", dtype=dtype)
    for name, parameter in layer.named_parameters():
        x = torch.randn(parameter.shape)
        parameter.data.copy_(1 + 0.2 * x if "norm" in name else x * parameter.shape[-1] ** -0.5)
    return layer


def batch_of(config: DeepseekConfig, *lengths: tuple[int, int]) -> tuple[PagedLatentCache, Batch]:
    """A batch of sequences with `(earlier, new)` tokens; the earlier ones are not written."""
    cache = PagedLatentCache(config, sum(-(-sum(pair) // 64) for pair in lengths), dtype=torch.float32)
    sequences = [cache.allocate(sum(pair)) for pair in lengths]
    for sequence, (earlier, _) in zip(sequences, lengths, strict=True):
        if earlier:
            cache.append([sequence], [earlier])
    return cache, cache.append(sequences, [new for _, new in lengths])


def by_the_paper(layer: Attention, config: DeepseekConfig, x: Tensor) -> Tensor:
    """One sequence, head by head and token by token, from the equations."""

    def norm(v: Tensor, weight: Tensor) -> Tensor:
        return v / math.sqrt(float(v.square().mean()) + 1e-6) * weight.double()

    def rotated(v: Tensor, position: int) -> Tensor:
        half = config.qk_rope_head_dim // 2
        angles = position * config.rope_theta ** (-torch.arange(half).double() / half)
        turn = torch.polar(torch.ones(half).double(), angles)
        return torch.view_as_real(torch.view_as_complex(v.reshape(half, 2).contiguous()) * turn).flatten()

    nope, rope_dim, v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    w_first, w_kv_a = (layer.qkv_a_proj.weight.double()[rows] for rows in layer.qkv_a_proj.parts)
    w_kv_b = layer.kv_b_proj.weight.double()
    queries, keys, values = [], [], []
    for position, token in enumerate(x.double()):
        q = w_first @ token
        if layer.q_b_proj is not None and layer.q_a_layernorm is not None:
            q = layer.q_b_proj.weight.double() @ norm(q, layer.q_a_layernorm)
        latent = w_kv_a @ token
        c, k_pe = norm(latent[: config.kv_lora_rank], layer.kv_a_layernorm), latent[config.kv_lora_rank :]
        kv = (w_kv_b @ c).view(config.num_attention_heads, nope + v_dim)
        q = q.view(config.num_attention_heads, nope + rope_dim)
        queries.append([torch.cat([head[:nope], rotated(head[nope:], position)]) for head in q])
        keys.append([torch.cat([head[:nope], rotated(k_pe, position)]) for head in kv])
        values.append([head[nope:] for head in kv])
    outputs = []
    for position in range(len(x)):
        heads = []
        for h in range(config.num_attention_heads):
            scores = torch.stack([queries[position][h] @ keys[j][h] for j in range(position + 1)])
            p = (scores / math.sqrt(nope + rope_dim)).softmax(0)
            heads.append(sum(p[j] * values[j][h] for j in range(position + 1)))
        outputs.append(layer.o_proj.weight.double() @ torch.cat(heads))
    return torch.stack(outputs)


@pytest.mark.parametrize("absorbed", [False, True], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("q_lora_rank", [None, 40])
def test_attention_is_the_papers(q_lora_rank: int | None, absorbed: bool) -> None:
    config = replace(V3, rope_scaling=None, q_lora_rank=q_lora_rank)
    layer = random_attention(config)
    cos_sin = rope_cos_sin(64, config.qk_rope_head_dim)
    cache, batch = batch_of(config, (0, 6))
    x = torch.randn(6, config.hidden_size)
    got = layer(x, batch, cache.pages[0], cos_sin, absorbed=absorbed)
    assert_rows_close(got, by_the_paper(layer, config, x), 1e-5)


def test_the_cache_holds_the_normalised_latent_and_the_rotated_key() -> None:
    layer = random_attention(V3)
    cache, batch = batch_of(V3, (0, 3))
    cos_sin = rope_cos_sin(64, V3.qk_rope_head_dim)
    cos_sin[1:] = float("nan")  # position 0 turns nothing, the others show that the table was used
    x = torch.randn(3, V3.hidden_size)
    layer(x, batch, cache.pages[0], cos_sin, absorbed=True)
    rows = cache.pages[0].flatten(0, 1)[batch.slot_mapping]
    latent = x @ layer.qkv_a_proj.weight[layer.qkv_a_proj.parts[1]].T
    c = latent[:, : V3.kv_lora_rank]
    want = c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.kv_a_layernorm
    assert_rows_close(rows[:, : V3.kv_lora_rank], want, 1e-6)
    assert_rows_close(rows[:1, V3.kv_lora_rank :], latent[:1, V3.kv_lora_rank :], 1e-6)
    assert rows[1:, V3.kv_lora_rank :].isnan().all()


def test_softmax_scale_has_yarns_correction() -> None:
    assert Attention(V3, gemm="bf16", dtype=torch.float32).softmax_scale == V3.softmax_scale
    with torch.device("meta"):
        for family, want in (("v3", 0.135234), ("v2-lite", 0.114721)):
            layer = Attention(RELEASED[family], gemm="bf16", dtype=torch.bfloat16)
            assert layer.softmax_scale == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("earlier", "new", "absorbed"),
    [(0, 1, False), (0, 170, False), (1, 1, True), (4096, 1, True), (4096, 170, True), (4096, 171, False)],
)
def test_auto_takes_the_form_with_fewer_operations(earlier: int, new: int, absorbed: bool) -> None:
    config = replace(RELEASED["v3"], num_hidden_layers=1)
    _, batch = batch_of(config, (earlier, new))
    assert absorbed_is_cheaper(config, batch) is absorbed
    heads, c = config.num_attention_heads, config.kv_lora_rank
    nope, rope_dim, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    expanded_ops = heads * 2 * ((earlier + new) * c * (nope + v) + new * earlier * (nope + rope_dim + v))
    absorbed_ops = heads * 2 * (new * c * (nope + v) + new * earlier * (2 * c + rope_dim))
    assert (absorbed_ops < expanded_ops) is absorbed


def test_absorption_takes_views_of_the_weight_and_no_copy() -> None:
    layer = random_attention(VARIANTS["V2-Lite"])
    w_uk, w_uv = layer.absorption()
    assert w_uk.shape == (4, V3.qk_nope_head_dim, V3.kv_lora_rank)
    assert w_uv.shape == (4, V3.v_head_dim, V3.kv_lora_rank)
    for view in (w_uk, w_uv):
        assert view.untyped_storage().data_ptr() == layer.kv_b_proj.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [((70, 1), (3, 1), (0, 1)), ((5, 2), (0, 3))], ids=["decode", "unequal"])
def test_absorbed_queries_and_values_are_written_in_place(
    lengths: tuple[tuple[int, int], ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each channel from its product, in the layout that the next op takes, between decoding of any kind."""
    layer = random_attention(V3, dtype)
    cache, batch = batch_of(V3, *lengths)
    t, heads, c = sum(new for _, new in lengths), V3.num_attention_heads, V3.kv_lora_rank
    decoded = torch.randn(t, heads, c).to(dtype)
    queries = []

    def decode(q: Tensor, *args: object, **options: object) -> tuple[Tensor, None]:
        queries.append(q)
        return decoded.view(*q.shape[:-1], c), None

    monkeypatch.setattr(attention_module, "mla_decode", decode)
    projected = torch.randn(t, heads, V3.qk_head_dim).to(dtype)
    q_nope, q_pe = torch.split(projected, [V3.qk_nope_head_dim, V3.qk_rope_head_dim], dim=-1)
    values = layer.attend_absorbed(q_nope, q_pe, batch, cache.pages[0])

    limit = 1e-6 if dtype == torch.float32 else BF16_LIMIT
    w_uk, w_uv = (w.double() for w in layer.absorption())
    [q] = queries
    assert q.is_contiguous()
    q = q.view(t, heads, c + V3.qk_rope_head_dim)
    assert_rows_close(q[..., :c], torch.einsum("thn,hnc->thc", q_nope.double(), w_uk), limit)
    assert torch.equal(q[..., c:], q_pe)
    assert_rows_close(values, torch.einsum("thc,hvc->thv", decoded.double(), w_uv), limit)
    assert values.is_contiguous(), "o_proj's input would be a copy"
