"""The bookkeeping of pages, and the bytes that they take."""

from dataclasses import replace

import pytest
import torch

from deepseek_ops.model import CacheFullError, PagedLatentCache
from deepseek_ops.model.config import RELEASED
from tests.model.conftest import V3

META = torch.device("meta")


@pytest.mark.parametrize(("family", "per_token"), [("v2-lite", 31_104), ("v2", 69_120), ("v3", 70_272)])
def test_bytes_per_token_are_those_of_the_reports(family: str, per_token: int) -> None:
    cache = PagedLatentCache(RELEASED[family], 16, device=META)
    assert cache.num_bytes == 16 * 64 * per_token


def test_fp8_rows_take_656_bytes() -> None:
    cache = PagedLatentCache(RELEASED["v3"], 16, dtype=torch.float8_e4m3fn, device=META)
    assert cache.num_bytes == 16 * 64 * 61 * 656


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_measured_bytes_are_predicted_bytes(dtype: torch.dtype, itemsize: int) -> None:
    cache = PagedLatentCache(V3, 5, dtype=dtype)
    predicted = V3.num_hidden_layers * 5 * 64 * (V3.kv_lora_rank + V3.qk_rope_head_dim) * itemsize
    assert cache.num_bytes == predicted == sum(p.untyped_storage().nbytes() for p in cache.pages)


def test_fp8_rows_are_refused_for_other_widths() -> None:
    with pytest.raises(ValueError, match=r"512 \+ 64 channels, got 32 \+ 16"):
        PagedLatentCache(V3, 1, dtype=torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="float16"):
        PagedLatentCache(V3, 1, dtype=torch.float16)


def test_append_says_where_each_token_goes() -> None:
    cache = PagedLatentCache(V3, 6, device="cpu")
    a, b = cache.allocate(), cache.allocate()
    cache.append([a], [63])
    batch = cache.append([b, a], [2, 3])
    assert batch.positions.tolist() == [0, 1, 63, 64, 65]
    assert batch.cache_seqlens.tolist() == batch.seqlens_k == [2, 66]
    assert batch.cu_seqlens_q.tolist() == [0, 2, 5]
    assert batch.cu_seqlens_k.tolist() == [0, 2, 68]
    (b0, _), (a0, a1) = batch.block_table.tolist()
    assert len({a0, a1, b0}) == 3
    assert batch.slot_mapping.tolist() == [b0 * 64, b0 * 64 + 1, a0 * 64 + 63, a1 * 64, a1 * 64 + 1]
    assert batch.has_prefix
    assert batch.uniform_seqlen_q is None
    assert (cache.length(a), cache.length(b)) == (66, 2)


def test_no_two_tokens_share_a_slot_through_any_history() -> None:
    generator = torch.Generator().manual_seed(0)
    cache = PagedLatentCache(V3, 12)
    owner: dict[int, tuple[int, int]] = {}
    live: list[int] = []
    for _ in range(200):
        if live and torch.rand((), generator=generator) < 0.3:
            gone = live.pop(int(torch.randint(len(live), (), generator=generator)))
            cache.free(gone)
            owner = {slot: who for slot, who in owner.items() if who[0] != gone}
        live.append(cache.allocate())
        lengths = [int(torch.randint(1, 90, (), generator=generator)) for _ in live]
        try:
            batch = cache.append(live, lengths)
        except CacheFullError:
            cache.free(live.pop())
            continue
        tokens = [
            (s, k - q + i) for s, q, k in zip(live, batch.seqlens_q, batch.seqlens_k, strict=True) for i in range(q)
        ]
        for slot, token in zip(batch.slot_mapping.tolist(), tokens, strict=True):
            assert owner.setdefault(slot, token) == token
    for sequence in live:
        cache.free(sequence)
    assert cache.num_free_pages == cache.num_pages == 12


def test_advance_is_append_in_place() -> None:
    moving, fresh = (PagedLatentCache(V3, 9) for _ in range(2))
    lengths = [62, 1, 127]
    for cache in (moving, fresh):
        for length in lengths:
            cache.append([cache.allocate(192)], [length])
    batch = moving.append([0, 1, 2], [1, 1, 1])
    tensors = {name: x for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}
    pointers = {name: x.data_ptr() for name, x in tensors.items()}
    fresh.append([0, 1, 2], [1, 1, 1])
    for _ in range(4):
        moving.advance(batch)
        want = fresh.append([0, 1, 2], [1, 1, 1])
        for name, x in tensors.items():
            assert torch.equal(x, getattr(want, name)) or name == "block_table", name
        assert (batch.seqlens_k, moving.length(0)) == (want.seqlens_k, fresh.length(0))
    assert {name: x.data_ptr() for name, x in tensors.items()} == pointers


def test_advance_stops_at_the_last_reserved_page() -> None:
    cache = PagedLatentCache(V3, 4)
    cache.append([cache.allocate()], [63])
    batch = cache.append([0], [1])
    with pytest.raises(CacheFullError, match="no reserved page"):
        cache.advance(batch)
    with pytest.raises(ValueError, match="one new token per sequence"):
        cache.advance(cache.append([0], [2]))


def test_a_full_cache_says_so_takes_nothing_and_can_grow() -> None:
    cache = PagedLatentCache(V3, 2)
    first = cache.allocate(64)
    with pytest.raises(CacheFullError, match="65 tokens needs 2 more pages of 64, 1 of 2 are free"):
        cache.allocate(65)
    assert cache.num_free_pages == 1
    cache.append([first], [1])
    for pages in cache.pages:
        pages[:, 0] = 7
    cache.grow(1)
    assert cache.num_bytes == 3 * 64 * 48 * 2 * V3.num_hidden_layers
    assert all((pages[:2, 0] == 7).all() and not pages[2].any() for pages in cache.pages)
    cache.allocate(65)
    assert cache.num_free_pages == 0


@pytest.mark.parametrize(
    ("sequences", "num_tokens", "message"), [([0, 0], [1, 1], "named once"), ([0], [0], "one token or more")]
)
def test_bad_appends_are_refused(sequences: list[int], num_tokens: list[int], message: str) -> None:
    cache = PagedLatentCache(V3, 2)
    cache.allocate()
    with pytest.raises(ValueError, match=message):
        cache.append(sequences, num_tokens)


def test_truncate_forgets_tokens_and_keeps_pages() -> None:
    cache = PagedLatentCache(replace(V3, num_hidden_layers=1), 2)
    sequence = cache.allocate(128)
    slots = cache.append([sequence], [70]).slot_mapping
    cache.truncate(sequence, 60)
    again = cache.append([sequence], [10])
    assert torch.equal(again.slot_mapping, slots[60:])
    with pytest.raises(ValueError, match=r"0 to 70, got 71"):
        cache.truncate(sequence, 71)
