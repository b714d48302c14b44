"""The paged latent cache of MLA: writing tokens into it, and reading them back in order.

Kernels: csrc/kernels/mla_cache_write.cuh and mla_cache_gather.cuh.  Method: DeepSeek-V2 report (arXiv:2405.04434),
section 2.1.

A token's row is its compressed latent `kv_c` followed by its rotated key `k_pe`, shared by all heads. A cache is
`[num_pages, page_size, row]`; `slot = page * page_size + offset` names a row, and row i of a `block_table` lists the
pages of request i in order. Three formats, told apart by their dtype:

- the model's dtype: `kv_lora_rank + rope_dim` elements (576 in DeepSeek-V2 and V3);
- FP8 with scales in each row, uint8 rows of 656 bytes, little endian: 512 e4m3 latents | 4 float32 scales, one per 128
  latents | 64 bfloat16 rotated channels, which are not quantized. Only for 512 + 64;
- FP8 with one scale for all, float8_e4m3fn rows of 576 elements, each of which stands for itself times `kv_scale`. Half
  of the bytes of bfloat16, and coarser: e4m3 has 4 bits of precision, here for the rotated channels, too. Only for
  512 + 64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checking import Checker
from .norm import rms_norm_reference
from .numeric import FP8
from .quantize import (
    AMAX_FLOOR,
    HIGH_PRECISION,
    cast_to_fp8_reference,
    check_out_dtype,
    per_token_cast_from_fp8_reference,
    per_token_cast_to_fp8_reference,
)
from .registry import register_op
from .rope import rope_reference
from .segments import segments

__all__ = ["MLA_FP8_ROW_BYTES", "mla_cache_gather", "mla_cache_shape", "mla_cache_write"]

KV_LORA_RANK = 512
ROPE_DIM = 64
"""DeepSeek's extents, the only ones that the FP8 format knows."""
MLA_FP8_ROW_BYTES = 656
"""Bytes of a token in the FP8 cache: 512 e4m3 + 4 float32 + 64 bfloat16."""

MIN_KV_SCALE = 1e-30
"""Its inverse, and what it may be multiplied by, are float32 numbers."""

INDEX_DTYPES = (torch.int32, torch.int64)


def mla_cache_shape(
    num_pages: int,
    page_size: int,
    *,
    kv_lora_rank: int = KV_LORA_RANK,
    rope_dim: int = ROPE_DIM,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[int, int, int]:
    """The shape of a cache of `num_pages` pages in `dtype`; uint8 and float8_e4m3fn mean the FP8 formats.

    Raises:
        ValueError: an FP8 format for extents other than 512 + 64.
    """
    if dtype not in (torch.uint8, FP8):
        return num_pages, page_size, kv_lora_rank + rope_dim
    if (kv_lora_rank, rope_dim) != (KV_LORA_RANK, ROPE_DIM):
        raise ValueError(f"mla_cache_shape: the FP8 formats are for 512 + 64 channels, got {kv_lora_rank} + {rope_dim}")
    return num_pages, page_size, MLA_FP8_ROW_BYTES if dtype == torch.uint8 else KV_LORA_RANK + ROPE_DIM


def has_row_scales(kv_cache: object) -> bool:
    """Whether a cache is in the FP8 format of 656 bytes a row."""
    return isinstance(kv_cache, Tensor) and kv_cache.dtype == torch.uint8


def has_one_scale(kv_cache: object) -> bool:
    """Whether a cache is in the FP8 format of 576 bytes a row."""
    return isinstance(kv_cache, Tensor) and kv_cache.dtype == FP8


def is_fp8_cache(kv_cache: object) -> bool:
    return has_row_scales(kv_cache) or has_one_scale(kv_cache)


def row_width(kv_cache: Tensor, plain: int | str) -> int | str:
    """Elements of a row in the format of the cache; `plain`, if that is the model's dtype."""
    if has_row_scales(kv_cache):
        return MLA_FP8_ROW_BYTES
    return KV_LORA_RANK + ROPE_DIM if has_one_scale(kv_cache) else plain


def check_kv_scale(check: Checker, kv_cache: Tensor, kv_scale: float) -> None:
    if has_one_scale(kv_cache):
        check.true(MIN_KV_SCALE <= kv_scale <= 1 / MIN_KV_SCALE, "kv_scale", "from 1e-30 to 1e30", kv_scale)
    else:
        check.true(kv_scale == 1, "kv_scale", "1, since kv_cache is not float8_e4m3fn", kv_scale)


def row_alignment(x: Tensor) -> int:
    """Bytes at whose multiples the rows of `x` must start: 16, what wide loads need, where rows are so wide at all."""
    return 16 if x.shape[-1] % 8 == 0 else x.element_size()


def check_paging(check: Checker, kv_cache: Tensor, block_table: Tensor, num_requests: int | str) -> tuple[int, int]:
    """A cache's pages, whose row width is checked already, and their table; returns the table's `(b, max_pages)`."""
    check.row_stride("kv_cache", kv_cache, row_alignment(kv_cache))
    check.true(kv_cache.shape[1] >= 1, "page_size", "at least 1", kv_cache.shape[1])
    b, max_pages = check.tensor("block_table", block_table, (num_requests, "max_pages"), torch.int32)
    check.row_stride("block_table", block_table, 4)
    return b, max_pages


def cached_rows(
    kv_cache: Tensor, page: Tensor, offset: Tensor, dtype: torch.dtype, kv_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Rows `offset` of pages `page`, dequantized to `dtype`, as float32, and which of the pages exist.

    The row of a page that does not exist holds anything at all.
    """
    num_pages, _, width = kv_cache.shape
    valid = (page >= 0) & (page < num_pages)
    pool = kv_cache if num_pages else kv_cache.new_zeros(1, kv_cache.shape[1], width)
    pool = pool.view(torch.uint8) if is_fp8_cache(kv_cache) else pool
    rows = pool[torch.where(valid, page, 0).long(), offset.long()]
    if has_one_scale(kv_cache):
        rows = rows.view(FP8).float() * kv_scale
    elif has_row_scales(kv_cache):
        latent, sf, rope = torch.split(rows, [KV_LORA_RANK, 4 * 4, ROPE_DIM * 2], -1)
        kv_c = per_token_cast_from_fp8_reference(
            latent.contiguous().view(FP8), sf.contiguous().view(torch.float32), torch.float32
        )
        rows = torch.cat((kv_c, rope.contiguous().view(torch.bfloat16).float()), -1)
    return rows.to(dtype).float(), valid


# -------------------------------------------------------------------------------------------- mla_cache_write


def mla_cache_write(
    kv_c: Tensor,
    k_pe: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = True,
    kv_scale: float = 1.0,
) -> None:
    """Normalises the latents, rotates the keys and writes both into the cache: `[norm(kv_c) | rope(k_pe)]`.

    `norm` is `rms_norm`, rounded to `kv_c`'s dtype as there; without `norm_weight` the latents are written as they are.
    The rotation is that of `rope`, computed in float32 and rounded once, to what the cache stores. In the FP8 format of
    656 bytes each run of 128 latents is quantized as `per_token_cast_to_fp8` does. In that of one scale, every channel
    is multiplied by `1 / kv_scale` in float32 and rounded to e4m3; what is larger than 448 then becomes 448.

    Args:
        kv_c: `[t, kv_lora_rank]` bfloat16, float16 or float32, compressed latents.
        k_pe: `[t, rope_dim]` in the same dtype, `rope_dim` even, keys before rotation.
        positions: `[t]` int32 or int64, clamped to `[0, max_position)`.
        cos_sin: `[max_position, rope_dim]` float32: `rope_dim / 2` cosines, then as many sines.
        slot_mapping: `[t]` int32 or int64, the row of the cache that a token goes to. A token whose slot lies outside
            `[0, num_pages * page_size)` is skipped (-1 marks padding). Slots in range must differ from each other:
            what a slot that is named twice holds afterwards is undefined.
        kv_cache: `[num_pages, page_size, kv_lora_rank + rope_dim]` in `kv_c`'s dtype or in float8_e4m3fn, or
            `[num_pages, page_size, 656]` uint8. Written in place, all other rows untouched.
        norm_weight: `[kv_lora_rank]` in `kv_c`'s dtype or float32.
        eps: added to the mean of the squares, positive.
        interleaved: rotate the pairs `(2i, 2i + 1)`, as DeepSeek's checkpoints want it; else `(i, i + rope_dim / 2)`.
        kv_scale: of a float8_e4m3fn cache, from 1e-30 to 1e30; 1 for the others.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride or device is not as above, or `kv_cache` shares memory with an input.
    """
    options = (norm_weight, eps, interleaved, kv_scale)
    _mla_cache_write(kv_c, k_pe, positions, cos_sin, slot_mapping, kv_cache, *options)


def _check_write(
    kv_c: Tensor,
    k_pe: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    interleaved: bool,
    kv_scale: float = 1.0,
) -> None:
    check = Checker("mla_cache_write")
    fp8 = is_fp8_cache(kv_cache)
    t, kv_lora_rank = check.tensor("kv_c", kv_c, ("t", KV_LORA_RANK if fp8 else "kv_lora_rank"), HIGH_PRECISION)
    _, rope_dim = check.tensor("k_pe", k_pe, (t, ROPE_DIM if fp8 else "rope_dim"), kv_c.dtype)
    check.true(kv_lora_rank >= 1, "kv_lora_rank", "at least 1", kv_lora_rank)
    check.true(rope_dim > 0 and rope_dim % 2 == 0, "rope_dim", "positive and even", rope_dim)
    check.row_stride("kv_c", kv_c, row_alignment(kv_c))
    check.row_stride("k_pe", k_pe, row_alignment(k_pe))
    check.tensor("positions", positions, (t,), INDEX_DTYPES)
    max_position, _ = check.tensor("cos_sin", cos_sin, ("max_position", rope_dim), torch.float32)
    check.true(max_position >= 1, "max_position", "at least 1", max_position)
    check.tensor("slot_mapping", slot_mapping, (t,), INDEX_DTYPES)
    shape = ("num_pages", "page_size", row_width(kv_cache, kv_lora_rank + rope_dim))
    check.tensor("kv_cache", kv_cache, shape, (kv_c.dtype, torch.uint8, FP8))
    check_kv_scale(check, kv_cache, kv_scale)
    check.row_stride("kv_cache", kv_cache, row_alignment(kv_cache))
    check.true(kv_cache.shape[1] >= 1, "page_size", "at least 1", kv_cache.shape[1])
    inputs = [kv_c, k_pe, positions, cos_sin, slot_mapping]
    for name, x in (("positions", positions), ("cos_sin", cos_sin), ("slot_mapping", slot_mapping)):
        check.contiguous(name, x)
    if norm_weight is not None:
        weight_dtypes = (kv_c.dtype,) if kv_c.dtype == torch.float32 else (kv_c.dtype, torch.float32)
        check.tensor("norm_weight", norm_weight, (kv_lora_rank,), weight_dtypes)
        check.contiguous("norm_weight", norm_weight)
        inputs.append(norm_weight)
    check.true(0 < eps < math.inf, "eps", "positive and finite", eps)
    check.writable("kv_cache", kv_cache, *inputs)


def mla_cache_write_reference(
    kv_c: Tensor,
    k_pe: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    interleaved: bool,
    kv_scale: float = 1.0,
) -> None:
    if norm_weight is not None:
        kv_c = rms_norm_reference(kv_c, norm_weight, eps)
    rope = rope_reference(k_pe.float(), positions, cos_sin, interleaved)
    if has_one_scale(kv_cache):
        inverse = float(1 / torch.tensor(kv_scale, dtype=torch.float32))
        rows = cast_to_fp8_reference(torch.cat((kv_c.float(), rope), -1) * inverse).view(torch.uint8)
        kv_cache = kv_cache.view(torch.uint8)
    elif has_row_scales(kv_cache):
        q, sf = per_token_cast_to_fp8_reference(kv_c, False, False, AMAX_FLOOR)
        parts = (q, sf, rope.to(torch.bfloat16))
        rows = torch.cat([x.contiguous().view(torch.uint8) for x in parts], -1)
    else:
        rows = torch.cat((kv_c, rope.to(kv_c.dtype)), -1)
    _scatter(rows, slot_mapping, kv_cache)


def _scatter(rows: Tensor, slot: Tensor, kv_cache: Tensor) -> None:
    """Writes the rows whose slot exists.

    Which ones do is known on the device only, so every row is written: one without a slot repeats the last one that
    has one (equal writes do not conflict), and if none has, all rewrite what slot 0 holds.
    """
    num_pages, page_size, _ = kv_cache.shape
    if rows.shape[0] == 0 or num_pages == 0:
        return
    row = torch.arange(rows.shape[0], device=rows.device)
    live = (slot >= 0) & (slot < num_pages * page_size)
    last = torch.where(live, row, -1).amax()
    source = torch.where(live, row, last.clamp(min=0))
    target = torch.where(last < 0, 0, slot.long()[source])
    where = (target // page_size, target % page_size)
    kv_cache.index_put_(where, torch.where(last < 0, kv_cache[where], rows[source]))


_mla_cache_write = register_op(
    "mla_cache_write(Tensor kv_c, Tensor k_pe, Tensor positions, Tensor cos_sin, Tensor slot_mapping, "
    "Tensor(a!) kv_cache, Tensor? norm_weight, float eps, bool interleaved, float kv_scale=1.0) -> ()",
    check=_check_write,
    fake=lambda *args: None,
    reference=mla_cache_write_reference,
)


# ------------------------------------------------------------------------------------------- mla_cache_gather


def mla_cache_gather(
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    total: int,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    kv_scale: float = 1.0,
) -> Tensor:
    """The cached tokens of a batch, one request after the other, dequantized: what expanded prefill reads.

    Args:
        kv_cache: `[num_pages, page_size, d]` bfloat16, float16 or float32, or, with d = 576, float8_e4m3fn; or
            `[num_pages, page_size, 656]` uint8, whose d is 576.
        block_table: `[b, max_pages]` int32, the pages of each request.
        cu_seqlens: `[b + 1]` int32. Token j of request i becomes row `cu_seqlens[i] + j`, up to `cu_seqlens[i + 1]`;
            clamped to `[0, total]`, and a decreasing pair is an empty request.
        total: number of rows of the result.
        out_dtype: bfloat16, float16 or float32.
        kv_scale: of a float8_e4m3fn cache, from 1e-30 to 1e30; 1 for the others.

    Returns:
        `[total, d]` in `out_dtype`. A row that belongs to no request, that lies past the end of its request's table, or
        whose page lies outside `[0, num_pages)` is zeros.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride or device is not as above, or `total` is negative.
    """
    return _mla_cache_gather(kv_cache, block_table, cu_seqlens, total, out_dtype, kv_scale)


def _check_gather(
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    total: int,
    out_dtype: torch.dtype,
    kv_scale: float = 1.0,
) -> None:
    check = Checker("mla_cache_gather")
    shape = ("num_pages", "page_size", row_width(kv_cache, "d"))
    check.tensor("kv_cache", kv_cache, shape, (*HIGH_PRECISION, torch.uint8, FP8))
    check_kv_scale(check, kv_cache, kv_scale)
    b, _ = check_paging(check, kv_cache, block_table, "b")
    check.tensor("cu_seqlens", cu_seqlens, (b + 1,), torch.int32)
    check.contiguous("cu_seqlens", cu_seqlens)
    check.true(total >= 0, "total", "not negative", total)
    check_out_dtype(check, out_dtype)


def _fake_gather(
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    total: int,
    out_dtype: torch.dtype,
    kv_scale: float = 1.0,
) -> Tensor:
    d = KV_LORA_RANK + ROPE_DIM if is_fp8_cache(kv_cache) else kv_cache.shape[-1]
    return kv_cache.new_empty((total, d), dtype=out_dtype)


def mla_cache_gather_reference(
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    total: int,
    out_dtype: torch.dtype,
    kv_scale: float = 1.0,
) -> Tensor:
    page_size, max_pages = kv_cache.shape[1], block_table.shape[1]
    start, _, request = segments(cu_seqlens, total)
    token = torch.arange(total, device=kv_cache.device) - start[request]
    table = pad(block_table, (0, 1, 0, 1), value=-1)  # no page past a table's end, and none for nobody
    page = table[request, (token // page_size).clamp(max=max_pages)]
    rows, valid = cached_rows(kv_cache, page, token % page_size, out_dtype, kv_scale)
    return torch.where(valid[:, None], rows, 0).to(out_dtype)


_mla_cache_gather = register_op(
    "mla_cache_gather(Tensor kv_cache, Tensor block_table, Tensor cu_seqlens, SymInt total, ScalarType out_dtype, "
    "float kv_scale=1.0) -> Tensor",
    check=_check_gather,
    fake=_fake_gather,
    reference=mla_cache_gather_reference,
)
