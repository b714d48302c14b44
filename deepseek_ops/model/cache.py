"""The paged latent cache: per token and layer one row of `kv_lora_rank + qk_rope_head_dim` numbers, for all heads.

A page holds 64 rows. Every layer has its own tensor of pages, and all layers share one page numbering: a sequence's
block table says in which pages its tokens lie, in every layer alike.

Growth is explicit. A cache is born with a number of pages and never grows by itself: when they are used up, `append`
raises `CacheFullError`, and the caller frees a sequence, calls `grow`, or gives up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_ops.mla_cache import mla_cache_shape
from deepseek_ops.numeric import ceil_div

from .config import DeepseekConfig

__all__ = ["PAGE_SIZE", "Batch", "CacheFullError", "PagedLatentCache"]

PAGE_SIZE = 64
"""Tokens per page."""


class CacheFullError(RuntimeError):
    """A sequence needs more pages than are free."""


@dataclass
class Batch:
    """Which tokens one forward pass adds to which sequences: `t` new tokens of `b` sequences, concatenated.

    The tensors live on the model's device and their shapes are fixed, so that a captured decode step can be replayed
    after `advance`. The plain numbers are known on the host: they choose the form of attention and size its outputs.
    """

    positions: Tensor
    """`[t]` int64, each new token's position in its sequence."""
    slot_mapping: Tensor
    """`[t]` int64, each new token's row in the cache: page * 64 + offset."""
    block_table: Tensor
    """`[b, max_pages]` int32, each sequence's pages; entries past its last page are not read."""
    cache_seqlens: Tensor
    """`[b]` int32, each sequence's length with its new tokens."""
    cu_seqlens_q: Tensor
    """`[b + 1]` int32, where each sequence's new tokens begin."""
    cu_seqlens_k: Tensor
    """`[b + 1]` int32, running sum of `cache_seqlens`."""
    sequences: list[int]
    """The cache's number of each sequence."""
    seqlens_q: list[int]
    """New tokens of each sequence."""
    seqlens_k: list[int]
    """Length of each sequence with its new tokens."""

    @property
    def has_prefix(self) -> bool:
        """Whether some sequence had tokens before this pass."""
        return self.seqlens_q != self.seqlens_k

    @property
    def uniform_seqlen_q(self) -> int | None:
        """The number of new tokens that all sequences have in common, if they do."""
        return self.seqlens_q[0] if len(set(self.seqlens_q)) == 1 else None

    def advance(self) -> None:
        """Moves a decode batch (one new token per sequence) on to the next token: in place, and without a host sync.

        This is the device's half of `PagedLatentCache.advance`; a captured decode step begins with it.
        """
        self.positions += 1
        page = self.block_table.gather(1, (self.positions // PAGE_SIZE).unsqueeze(1)).squeeze(1)
        self.slot_mapping.copy_(page * PAGE_SIZE + self.positions % PAGE_SIZE)
        self.cache_seqlens += 1
        self.cu_seqlens_k += self.cu_seqlens_q


class PagedLatentCache:
    """Pages of latents for a number of layers, and the bookkeeping of the sequences in them.

    Args:
        config: gives the row's width.
        num_pages: pages of 64 tokens. A page belongs to one sequence, so a sequence of n tokens takes ceil(n / 64).
        num_layers: layers with attention, by default those of the model without its MTP module.
        dtype: bfloat16 or float32 rows, or float8_e4m3fn for the packed FP8 rows of 656 bytes of `mla_cache_write`.

    Raises:
        TypeError: another dtype.
        ValueError: FP8 rows for a model whose rows are not 512 + 64 wide.
    """

    def __init__(
        self,
        config: DeepseekConfig,
        num_pages: int,
        *,
        num_layers: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        num_layers = config.num_hidden_layers if num_layers is None else num_layers
        if dtype not in (torch.bfloat16, torch.float32, torch.float8_e4m3fn):
            raise TypeError(f"a cache's dtype must be bfloat16, float32 or float8_e4m3fn, got {dtype}")
        storage_dtype = torch.uint8 if dtype == torch.float8_e4m3fn else dtype
        shape = mla_cache_shape(
            num_pages,
            PAGE_SIZE,
            kv_lora_rank=config.kv_lora_rank,
            rope_dim=config.qk_rope_head_dim,
            dtype=storage_dtype,
        )
        self.dtype = dtype
        self.pages = [torch.zeros(shape, dtype=storage_dtype, device=device) for _ in range(num_layers)]
        """Per layer `[num_pages, 64, width]`, bfloat16, float32 or (FP8 rows) uint8."""
        self.num_pages = num_pages
        self._free = list(range(num_pages))[::-1]
        self._pages_of: dict[int, list[int]] = {}
        self._length_of: dict[int, int] = {}
        self._next_sequence = 0

    @property
    def device(self) -> torch.device:
        return self.pages[0].device

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages of all layers."""
        return sum(pages.numel() * pages.element_size() for pages in self.pages)

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def allocate(self, num_tokens: int = 0) -> int:
        """A new empty sequence, with pages reserved for its first `num_tokens`; returns its number."""
        sequence = self._next_sequence
        self._next_sequence += 1
        self._pages_of[sequence], self._length_of[sequence] = [], 0
        try:
            self.reserve(sequence, num_tokens)
        except CacheFullError:
            self.free(sequence)
            raise
        return sequence

    def reserve(self, sequence: int, num_tokens: int) -> None:
        """Gives the sequence pages for `num_tokens` tokens in all.

        Raises:
            CacheFullError: too few pages are free; nothing is taken then.
        """
        pages = self._pages_of[sequence]
        missing = ceil_div(num_tokens, PAGE_SIZE) - len(pages)
        if missing > len(self._free):
            raise CacheFullError(
                f"a sequence of {num_tokens} tokens needs {missing} more pages of {PAGE_SIZE}, "
                f"{len(self._free)} of {self.num_pages} are free"
            )
        for _ in range(missing):
            pages.append(self._free.pop())

    def append(self, sequences: Sequence[int], num_tokens: Sequence[int]) -> Batch:
        """Adds `num_tokens[i]` new tokens to sequence `sequences[i]` and says where they go.

        Raises:
            CacheFullError: too few pages are free. Sequences keep their lengths then.
            ValueError: a sequence is named twice, or gets less than one token.
        """
        seqlens_q = list(num_tokens)
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"append: each sequence must be named once, got {list(sequences)}")
        if min(seqlens_q, default=1) < 1:
            raise ValueError(f"append: each sequence must get one token or more, got {seqlens_q}")
        seqlens_k = [self._length_of[s] + n for s, n in zip(sequences, seqlens_q, strict=True)]
        for sequence, length in zip(sequences, seqlens_k, strict=True):
            self.reserve(sequence, length)
        self._length_of.update(zip(sequences, seqlens_k, strict=True))

        tables = [self._pages_of[s] for s in sequences]
        max_pages = max(map(len, tables), default=0)
        block_table = torch.tensor([pages + [0] * (max_pages - len(pages)) for pages in tables], dtype=torch.int32)
        block_table = block_table.view(len(tables), max_pages)
        positions = [torch.arange(k - q, k) for q, k in zip(seqlens_q, seqlens_k, strict=True)]
        slots = [
            row[p // PAGE_SIZE].long() * PAGE_SIZE + p % PAGE_SIZE
            for row, p in zip(block_table, positions, strict=True)
        ]
        empty = [torch.empty(0, dtype=torch.int64)]
        return Batch(
            positions=torch.cat(positions or empty).to(self.device),
            slot_mapping=torch.cat(slots or empty).to(self.device),
            block_table=block_table.to(self.device),
            cache_seqlens=torch.tensor(seqlens_k, dtype=torch.int32, device=self.device),
            cu_seqlens_q=_running_sum(seqlens_q).to(self.device),
            cu_seqlens_k=_running_sum(seqlens_k).to(self.device),
            sequences=list(sequences),
            seqlens_q=seqlens_q,
            seqlens_k=seqlens_k,
        )

    def advance(self, batch: Batch) -> None:
        """Adds one more token to each sequence of a decode batch and moves `batch` on to it, in place.

        The batch keeps its tensors and their shapes. Its block table does not grow, so the pages must have been
        reserved before `append` made it.

        Raises:
            CacheFullError: a sequence has no reserved page left.
            ValueError: the batch has more than one new token per sequence.
        """
        self.count_advance(batch)
        batch.advance()

    def count_advance(self, batch: Batch) -> None:
        """The host's half of `advance`: checks and counts, and touches no tensor. A replayed graph does the other.

        Raises:
            as `advance`. Nothing has changed then.
        """
        if batch.uniform_seqlen_q != 1:
            raise ValueError(f"advance: the batch must have one new token per sequence, got {batch.seqlens_q}")
        lengths = [length + 1 for length in batch.seqlens_k]
        if max(lengths) > batch.block_table.shape[1] * PAGE_SIZE or any(
            length > len(self._pages_of[s]) * PAGE_SIZE for s, length in zip(batch.sequences, lengths, strict=True)
        ):
            raise CacheFullError("a sequence has no reserved page left for its next token")
        self._length_of.update(zip(batch.sequences, lengths, strict=True))
        batch.seqlens_k = lengths

    def length(self, sequence: int) -> int:
        """Tokens that the sequence holds."""
        return self._length_of[sequence]

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Forgets the tokens after the first `num_tokens`; the pages stay with the sequence."""
        if not 0 <= num_tokens <= self._length_of[sequence]:
            raise ValueError(f"truncate: num_tokens must be 0 to {self._length_of[sequence]}, got {num_tokens}")
        self._length_of[sequence] = num_tokens

    def free(self, sequence: int) -> None:
        """Forgets the sequence and takes back its pages."""
        self._free += reversed(self._pages_of.pop(sequence))
        del self._length_of[sequence]

    def grow(self, num_pages: int) -> None:
        """Adds pages. Copies layer by layer, so one layer exists twice for a moment; a captured step is void after."""
        for layer, pages in enumerate(self.pages):
            self.pages[layer] = torch.cat([pages, pages.new_zeros(num_pages, *pages.shape[1:])])
        self._free = list(range(self.num_pages, self.num_pages + num_pages))[::-1] + self._free
        self.num_pages += num_pages


def _running_sum(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
