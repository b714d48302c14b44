"""Multi-head latent attention: decoding over the paged latent cache, prefill over expanded keys, and merging the two.

Decoding has a CUDA kernel for 16-bit caches of 576 channels and for the FP8 formats, prefill for 16-bit keys of 192
channels and values of 128.
Kernels: csrc/kernels/sm90_mla_decode.cuh, csrc/kernels/sm90_mla_prefill.cuh, csrc/kernels/merge_attn_states.cuh.
Method: DeepSeek-V2 report (arXiv:2405.04434), section 2.1.

Decoding is in the absorbed form: the up-projections of keys and values are folded into the query and the output, so
that all heads share one key per token, the cached row, whose first `head_dim_v` elements are also the value. Prefill is
in the expanded form, every head with keys and values of its own.

Causal masks are aligned bottom-right: the last query sees the last key. `lse` is the natural logarithm of the sum of
the exponentials of the scaled scores; where no key is visible it is -inf and the output is 0, the neutral element of
`merge_attn_states`. A key that is not visible leaves no trace, not even if it holds NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checking import Checker
from .mla_cache import (
    KV_LORA_RANK,
    ROPE_DIM,
    cached_rows,
    check_kv_scale,
    check_paging,
    is_fp8_cache,
    row_alignment,
    row_width,
)
from .numeric import FP8
from .quantize import HIGH_PRECISION
from .registry import register_op
from .segments import segments

__all__ = ["merge_attn_states", "mla_decode", "mla_decode_out", "mla_prefill"]

QUERY_CHUNK = 1024
"""Query rows whose scores the reference of prefill holds at a time."""


# ------------------------------------------------------------------------------------------------- mla_decode


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    head_dim_v: int = 512,
    batch_invariant: bool = False,
    kv_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Absorbed MLA over a paged cache: `softmax(softmax_scale * q @ k.T) @ k[:, :head_dim_v]` for each request.

    Computed in float32 and rounded once. The queries of a request are the last tokens of its sequence, whose rows are
    in the cache already.

    Args:
        q: `[b, s_q, h, head_dim_k]` bfloat16, float16 or float32; or `[total_q, h, head_dim_k]` with `cu_seqlens_q`.
            DeepSeek's `head_dim_k` is 576: 512 absorbed channels, then 64 rotated ones. Any `h >= 1`.
        kv_cache: `[num_pages, page_size, head_dim_k]` in `q`'s dtype, or one of the FP8 formats of `mla_cache_write`:
            `[num_pages, page_size, 656]` uint8, or with `head_dim_k` 576 float8_e4m3fn. These are dequantized to `q`'s
            dtype first; the CUDA kernels, for 16-bit queries, round them to float16 at most. Any `page_size >= 1`.
        block_table: `[b, max_pages]` int32, the pages of each request in order. Entries past a request's length are
            ignored; a page outside `[0, num_pages)` makes its keys invisible.
        cache_seqlens: `[b]` int32, keys of each request, its queries' own included; clamped to
            `[0, max_pages * page_size]`.
        softmax_scale: factor of the scores, positive. The model's is `192 ** -0.5`, times YaRN's correction.
        causal: query i of the s_q of a request sees the keys `j <= cache_seqlens - s_q + i`; without it, all.
        cu_seqlens_q: `[b + 1]` int32. The queries of request i are the rows `cu_seqlens_q[i]` up to
            `cu_seqlens_q[i + 1]` of `q`; clamped to `[0, total_q]`, and a decreasing pair is an empty request.
        head_dim_v: leading channels of a key that are its value; 512 for the FP8 formats.
        batch_invariant: the bits of a request depend on its own queries, keys, length and `softmax_scale` alone: not on
            the other requests, nor on how wide `block_table` is, nor on the GPU's size.
        kv_scale: of a float8_e4m3fn cache, from 1e-30 to 1e30; 1 for the others.

    Returns:
        `out`: `[b, s_q, h, head_dim_v]` or `[total_q, h, head_dim_v]` in `q`'s dtype.
        `lse`: `[b, s_q, h]` or `[total_q, h]` float32, natural logarithm.
        A query that sees no key, or that belongs to no request, gets out 0 and lse -inf.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, alignment or device is not as above.
    """
    options = (softmax_scale, causal, cu_seqlens_q, head_dim_v, batch_invariant, kv_scale)
    return _mla_decode(q, kv_cache, block_table, cache_seqlens, *options)


def mla_decode_out(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    batch_invariant: bool = False,
    kv_scale: float = 1.0,
) -> None:
    """`mla_decode` into `out` and `lse`, every element of which is overwritten.

    Args:
        q, kv_cache, block_table, cache_seqlens, softmax_scale, causal, cu_seqlens_q, batch_invariant, kv_scale: as in
            `mla_decode`.
        out: `[b, s_q, h, head_dim_v]` or `[total_q, h, head_dim_v]` in `q`'s dtype.
        lse: `[b, s_q, h]` or `[total_q, h]` float32, contiguous. Neither shares memory with an input or the other.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, alignment or device is not as above.
    """
    options = (softmax_scale, causal, cu_seqlens_q, batch_invariant, kv_scale)
    _mla_decode_out(q, kv_cache, block_table, cache_seqlens, out, lse, *options)


def _check_operands(
    check: Checker,
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None,
    kv_scale: float,
) -> tuple[int, ...]:
    """What both forms of decoding share; returns the shape of `q`."""
    fp8 = is_fp8_cache(kv_cache)
    wanted = KV_LORA_RANK + ROPE_DIM if fp8 else "head_dim_k"
    lead = ("b", "s_q") if cu_seqlens_q is None else ("total_q",)
    shape = check.tensor("q", q, (*lead, "h", wanted), HIGH_PRECISION)
    check.true(shape[-2] >= 1, "h", "at least 1", shape[-2])
    check.row_stride("q", q, row_alignment(q))
    rows = ("num_pages", "page_size", row_width(kv_cache, shape[-1]))
    check.tensor("kv_cache", kv_cache, rows, (q.dtype, torch.uint8, FP8))
    check_kv_scale(check, kv_cache, kv_scale)
    b, _ = check_paging(check, kv_cache, block_table, shape[0] if cu_seqlens_q is None else "b")
    check.tensor("cache_seqlens", cache_seqlens, (b,), torch.int32)
    check.contiguous("cache_seqlens", cache_seqlens)
    if cu_seqlens_q is not None:
        check.tensor("cu_seqlens_q", cu_seqlens_q, (b + 1,), torch.int32)
        check.contiguous("cu_seqlens_q", cu_seqlens_q)
    check_softmax_scale(check, softmax_scale)
    return shape


def check_softmax_scale(check: Checker, softmax_scale: float) -> None:
    check.true(0 < softmax_scale < float("inf"), "softmax_scale", "positive and finite", softmax_scale)


def _check_head_dim_v(check: Checker, kv_cache: Tensor, head_dim_k: int, head_dim_v: int) -> None:
    if is_fp8_cache(kv_cache):
        check.true(head_dim_v == KV_LORA_RANK, "head_dim_v", "512 for the FP8 formats", head_dim_v)
    check.true(1 <= head_dim_v <= head_dim_k, "head_dim_v", f"from 1 to head_dim_k = {head_dim_k}", head_dim_v)


def _check_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    causal: bool,
    cu_seqlens_q: Tensor | None,
    head_dim_v: int,
    batch_invariant: bool = False,
    kv_scale: float = 1.0,
) -> None:
    check = Checker("mla_decode")
    shape = _check_operands(check, q, kv_cache, block_table, cache_seqlens, softmax_scale, cu_seqlens_q, kv_scale)
    _check_head_dim_v(check, kv_cache, shape[-1], head_dim_v)


def _check_decode_out(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool,
    cu_seqlens_q: Tensor | None,
    batch_invariant: bool = False,
    kv_scale: float = 1.0,
) -> None:
    check = Checker("mla_decode_out")
    *lead, head_dim_k = _check_operands(
        check, q, kv_cache, block_table, cache_seqlens, softmax_scale, cu_seqlens_q, kv_scale
    )
    *_, head_dim_v = check.tensor("out", out, (*lead, "head_dim_v"), q.dtype)
    _check_head_dim_v(check, kv_cache, head_dim_k, head_dim_v)
    check.row_stride("out", out, row_alignment(out))
    check.tensor("lse", lse, lead, torch.float32)
    check.contiguous("lse", lse)
    inputs = [q, kv_cache, block_table, cache_seqlens]
    if cu_seqlens_q is not None:
        inputs.append(cu_seqlens_q)
    check.writable("out", out, *inputs)
    check.writable("lse", lse, *inputs)
    check.writable("lse", lse, out)


def _fake_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    causal: bool,
    cu_seqlens_q: Tensor | None,
    head_dim_v: int,
    batch_invariant: bool = False,
    kv_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    lead = q.shape[:-1]
    return q.new_empty((*lead, head_dim_v)), q.new_empty(lead, dtype=torch.float32)


def mla_decode_reference(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    causal: bool,
    cu_seqlens_q: Tensor | None,
    head_dim_v: int,
    batch_invariant: bool = False,
    kv_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One query row after the other, so that its bits depend on nothing but its own request."""
    b, max_pages = block_table.shape
    page_size = kv_cache.shape[1]
    if cu_seqlens_q is None:
        offsets = torch.arange(b + 1, device=q.device) * q.shape[1]
        rows = q.flatten(0, 1)
    else:
        offsets, rows = cu_seqlens_q, q
    num_rows, num_heads, _ = rows.shape
    start, s_q, request = segments(offsets, num_rows)

    num_keys = pad(cache_seqlens.long().clamp(0, max_pages * page_size), (0, 1))[request]  # 0 for nobody's rows
    if causal:
        num_keys = num_keys - _queries_after((start + s_q)[request])
    pages = pad(block_table, (0, 0, 0, 1), value=-1)[request]
    key = torch.arange(max_pages * page_size, device=q.device)

    out = q.new_empty(num_rows, num_heads, head_dim_v)
    lse = q.new_empty(num_rows, num_heads, dtype=torch.float32)
    for row in range(num_rows):
        page = pages[row].repeat_interleave(page_size)
        keys, exists = cached_rows(kv_cache, page, key % page_size, q.dtype, kv_scale)
        visible = exists & (key < num_keys[row])
        keys = torch.where(visible[:, None], keys, 0)  # 0 x NaN would be NaN
        p, lse[row] = _softmax(rows[row].float() @ keys.T * softmax_scale, visible)
        out[row] = p @ keys[:, :head_dim_v]
    return out.view(*q.shape[:-1], head_dim_v), lse.view(q.shape[:-1])


def _queries_after(end: Tensor) -> Tensor:
    """How many queries of its sequence, which reaches up to row `end`, come after each row; 0 for nobody's rows."""
    return (end - 1 - torch.arange(end.shape[0], device=end.device)).clamp(min=0)


def _softmax(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over the visible keys (the last dimension) and its log-sum-exp; zeros and -inf if there are none."""
    scores = torch.where(visible, scores, -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.where(lse.isneginf()[..., None], 0, scores.softmax(-1)), lse


def mla_decode_out_reference(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool,
    cu_seqlens_q: Tensor | None,
    batch_invariant: bool = False,
    kv_scale: float = 1.0,
) -> None:
    options = (softmax_scale, causal, cu_seqlens_q, out.shape[-1], batch_invariant, kv_scale)
    new_out, new_lse = mla_decode_reference(q, kv_cache, block_table, cache_seqlens, *options)
    out.copy_(new_out)
    lse.copy_(new_lse)


_mla_decode = register_op(
    "mla_decode(Tensor q, Tensor kv_cache, Tensor block_table, Tensor cache_seqlens, float softmax_scale, bool causal, "
    "Tensor? cu_seqlens_q, int head_dim_v, bool batch_invariant=False, float kv_scale=1.0) -> (Tensor, Tensor)",
    check=_check_decode,
    fake=_fake_decode,
    reference=mla_decode_reference,
)

_mla_decode_out = register_op(
    "mla_decode_out(Tensor q, Tensor kv_cache, Tensor block_table, Tensor cache_seqlens, Tensor(a!) out, "
    "Tensor(b!) lse, float softmax_scale, bool causal, Tensor? cu_seqlens_q, bool batch_invariant=False, "
    "float kv_scale=1.0) -> ()",
    check=_check_decode_out,
    fake=lambda *args: None,
    reference=mla_decode_out_reference,
)


# ------------------------------------------------------------------------------------------------ mla_prefill


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of a batch of sequences over expanded keys: `softmax(softmax_scale * q @ k.T) @ v` by head.

    Computed in float32 and rounded once. Sequence i has the rows `cu_seqlens_q[i]` up to `cu_seqlens_q[i + 1]` of `q`,
    and likewise of `k` and `v`; offsets are clamped to the rows there are, and a decreasing pair is empty.

    Args:
        q: `[total_q, h, head_dim_k]` bfloat16, float16 or float32. DeepSeek's `head_dim_k` is 192: 128 channels, then
            64 rotated ones.
        k: `[total_k, h, head_dim_k]` in the same dtype.
        v: `[total_k, h, head_dim_v]` in the same dtype; DeepSeek's `head_dim_v` is 128. A visible value that is not
            finite makes its channel of the output NaN.
        cu_seqlens_q: `[b + 1]` int32.
        cu_seqlens_k: `[b + 1]` int32.
        softmax_scale: factor of the scores, positive. The model's is `192 ** -0.5`, times YaRN's correction.
        causal: query i of the s_q of a sequence sees its first `s_k - s_q + i + 1` keys; without it, all s_k.

    Returns:
        `out`: `[total_q, h, head_dim_v]` in `q`'s dtype.
        `lse`: `[total_q, h]` float32, natural logarithm.
        A query that sees no key, or that belongs to no sequence, gets out 0 and lse -inf.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride, alignment or device is not as above.
    """
    return _mla_prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)


def _check_prefill(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float, causal: bool
) -> None:
    check = Checker("mla_prefill")
    _, h, head_dim_k = check.tensor("q", q, ("total_q", "h", "head_dim_k"), HIGH_PRECISION)
    check.true(h >= 1, "h", "at least 1", h)
    total_k, *_ = check.tensor("k", k, ("total_k", h, head_dim_k), q.dtype)
    *_, head_dim_v = check.tensor("v", v, (total_k, h, "head_dim_v"), q.dtype)
    check.true(head_dim_k >= 1, "head_dim_k", "at least 1", head_dim_k)
    check.true(head_dim_v >= 1, "head_dim_v", "at least 1", head_dim_v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check.row_stride(name, x, row_alignment(x))
    (num_offsets,) = check.tensor("cu_seqlens_q", cu_seqlens_q, ("b + 1",), torch.int32)
    check.true(num_offsets >= 1, "cu_seqlens_q", "of one or more offsets", num_offsets)
    check.tensor("cu_seqlens_k", cu_seqlens_k, (num_offsets,), torch.int32)
    check.contiguous("cu_seqlens_q", cu_seqlens_q)
    check.contiguous("cu_seqlens_k", cu_seqlens_k)
    check_softmax_scale(check, softmax_scale)


def _fake_prefill(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    lead = q.shape[:-1]
    return q.new_empty((*lead, v.shape[-1])), q.new_empty(lead, dtype=torch.float32)


def mla_prefill_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Every query meets every key of the batch, and the mask leaves it those of its sequence up to its own."""
    start_q, s_q, sequence = segments(cu_seqlens_q, q.shape[0])
    start_k, s_k, _ = segments(cu_seqlens_k, k.shape[0])
    num_keys = s_k[sequence]
    if causal:
        num_keys = num_keys - _queries_after((start_q + s_q)[sequence])
    first = start_k[sequence]
    key = torch.arange(k.shape[0], device=q.device)

    queries, keys, values = (x.float().transpose(0, 1) for x in (q, k, v))
    # An invisible value has the weight 0, but 0 x NaN is NaN: values that are not finite go another way.
    finite = values.isfinite()
    values, poison = torch.where(finite, values, 0), (~finite).float()

    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    for begin in range(0, q.shape[0], QUERY_CHUNK):
        rows = slice(begin, begin + QUERY_CHUNK)
        visible = (key >= first[rows, None]) & (key < (first + num_keys)[rows, None])
        p, chunk_lse = _softmax(queries[:, rows] @ keys.mT * softmax_scale, visible)
        poisoned = visible.float() @ poison > 0
        out[rows] = torch.where(poisoned, torch.nan, p @ values).transpose(0, 1)
        lse[rows] = chunk_lse.T
    return out, lse


_mla_prefill = register_op(
    "mla_prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float softmax_scale, "
    "bool causal) -> (Tensor, Tensor)",
    check=_check_prefill,
    fake=_fake_prefill,
    reference=mla_prefill_reference,
)


# ------------------------------------------------------------------------------------------ merge_attn_states


def merge_attn_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    `lse = log(exp(lse_a) + exp(lse_b))`, `out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b`, computed in
    float32 and rounded once. Method: "Online normalizer calculation for softmax" (arXiv:1805.02867), section 3.1.

    Args:
        out_a: `[..., h, head_dim_v]` bfloat16, float16 or float32.
        lse_a: `[..., h]` float32, natural logarithm; -inf says that the set was empty, whatever its `out` holds.
        out_b: like `out_a`.
        lse_b: like `lse_a`.

    Returns:
        `out`: `[..., h, head_dim_v]` in the dtype of `out_a`.
        `lse`: `[..., h]` float32.
        Where one set is empty, the other's bits; where both are, out 0 and lse -inf.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape, stride or device is not as above.
    """
    return _merge_attn_states(out_a, lse_a, out_b, lse_b)


def _check_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    check = Checker("merge_attn_states")
    shape = check.tensor("out_a", out_a, dtype=HIGH_PRECISION, min_dim=2)
    check.tensor("lse_a", lse_a, shape[:-1], torch.float32)
    check.tensor("out_b", out_b, shape, out_a.dtype)
    check.tensor("lse_b", lse_b, shape[:-1], torch.float32)
    for name, x in (("out_a", out_a), ("out_b", out_b)):
        check.row_stride(name, x, row_alignment(x))
    check.row_stride("lse_a", lse_a, 4)
    check.row_stride("lse_b", lse_b, 4)


def merge_attn_states_reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (torch.exp(x - lse)[..., None] for x in (lse_a, lse_b))
    out = (weight_a * out_a.float() + weight_b * out_b.float()).to(out_a.dtype)
    empty_a, empty_b = (x.isneginf()[..., None] for x in (lse_a, lse_b))
    out = torch.where(empty_b, out_a, torch.where(empty_a, out_b, out))
    return torch.where(empty_a & empty_b, 0, out).contiguous(), lse.contiguous()


def _fake_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


_merge_attn_states = register_op(
    "merge_attn_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    check=_check_merge,
    fake=_fake_merge,
    reference=merge_attn_states_reference,
)
