"""Calls of MLA decoding, prefill and merging."""

from __future__ import annotations

from typing import Any

import torch

from tests.samples import Arguments, Bad, replace


def _int32(values: list[Any], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _mla_decode(device: str) -> Arguments:
    """Two requests of two queries and 5 heads over pages of 4; the second one's last page does not exist."""
    q = torch.randn(2, 2, 5, 576, device=device).bfloat16()
    kv_cache = torch.randn(6, 4, 576, device=device).bfloat16()
    return q, kv_cache, _int32([[4, 1, -1], [0, 5, 99]], device), _int32([3, 10], device), 0.1, True, None, 512


def _mla_decode_out(device: str) -> Arguments:
    """Ragged queries over an FP8 cache of scale 1."""
    q = torch.randn(5, 3, 576, device=device).bfloat16()
    latents = torch.randn(6, 4, 512, device=device).to(torch.float8_e4m3fn)
    parts = (latents, torch.ones(6, 4, 4, device=device), torch.randn(6, 4, 64, device=device).bfloat16())
    kv_cache = torch.cat([x.view(torch.uint8) for x in parts], -1)
    table, seqlens, cu_seqlens_q = _int32([[4, 1], [0, 5]], device), _int32([3, 8], device), _int32([0, 1, 5], device)
    out = torch.zeros(5, 3, 512, device=device).bfloat16()
    return q, kv_cache, table, seqlens, out, torch.zeros(5, 3, device=device), 0.1, True, cu_seqlens_q


def _mla_prefill(device: str) -> Arguments:
    q, k, v = (torch.randn(t, 2, d, device=device).bfloat16() for t, d in ((7, 192), (9, 192), (9, 128)))
    return q, k, v, _int32([0, 3, 7], device), _int32([0, 3, 9], device), 0.1, True


def _merge_attn_states(device: str) -> Arguments:
    out_a, out_b = torch.randn(2, 5, 3, 512, device=device).bfloat16()
    lse_a, lse_b = torch.randn(2, 5, 3, device=device)
    return out_a, lse_a, out_b, lse_b


SAMPLES = {
    "mla_decode": _mla_decode,
    "mla_decode_out": _mla_decode_out,
    "mla_prefill": _mla_prefill,
    "merge_attn_states": _merge_attn_states,
}


BAD_INPUT = [
    Bad("mla_decode", "q is no tensor", replace(0, lambda q: None), TypeError, "q must be a Tensor, got NoneType"),
    Bad("mla_decode", "q in float64", replace(0, lambda q: q.double()), TypeError, "q must be bfloat16 or float16 or float32, got float64"),
    Bad("mla_decode", "ragged q without offsets", replace(0, lambda q: q[0]), ValueError, r"q must be \[b, s_q, h, head_dim_k\], got \[2, 5, 576\]"),
    Bad("mla_decode", "no heads", replace(0, lambda q: q[:, :, :0]), ValueError, "h must be at least 1, got 0"),
    Bad("mla_decode", "q of another width", replace(0, lambda q: q[..., :512]), ValueError, r"kv_cache must be \[num_pages, page_size, 512\], got \[6, 4, 576\]"),
    Bad("mla_decode", "q not contiguous in its channels", replace(0, lambda q: q.mT.contiguous().mT), ValueError, "q must be contiguous in its last dimension, got strides"),
    Bad("mla_decode", "cache is no tensor", replace(1, lambda c: [c]), TypeError, "kv_cache must be a Tensor, got list"),
    Bad("mla_decode", "cache in another dtype", replace(1, lambda c: c.half()), TypeError, "kv_cache must be bfloat16 or uint8 or float8_e4m3fn, got float16"),
    Bad("mla_decode", "FP8 rows of the wrong width", replace(1, lambda c: c.new_zeros(6, 4, 576, dtype=torch.uint8)), ValueError, r"kv_cache must be \[num_pages, page_size, 656\], got \[6, 4, 576\]"),
    Bad("mla_decode", "cache without pages", replace(1, lambda c: c[0]), ValueError, r"kv_cache must be \[num_pages, page_size, 576\], got \[4, 576\]"),
    Bad("mla_decode", "pages without rows", replace(1, lambda c: c[:, :0]), ValueError, "page_size must be at least 1, got 0"),
    Bad("mla_decode", "table in int64", replace(2, lambda t: t.long()), TypeError, "block_table must be int32, got int64"),
    Bad("mla_decode", "table of another batch", replace(2, lambda t: t[1:]), ValueError, r"block_table must be \[2, max_pages\], got \[1, 3\]"),
    Bad("mla_decode", "table flat", replace(2, lambda t: t.flatten()), ValueError, r"block_table must be \[2, max_pages\], got \[6\]"),
    Bad("mla_decode", "table transposed", replace(2, lambda t: t.T.contiguous().T), ValueError, "block_table must be contiguous in its last dimension"),
    Bad("mla_decode", "lengths in float32", replace(3, lambda s: s.float()), TypeError, "cache_seqlens must be int32, got float32"),
    Bad("mla_decode", "a length too many", replace(3, lambda s: s.repeat(2)), ValueError, r"cache_seqlens must be \[2\], got \[4\]"),
    Bad("mla_decode", "lengths on another device", replace(3, lambda s: s.to("meta")), ValueError, "cache_seqlens must be on .* like q, got meta"),
    Bad("mla_decode", "scale zero", replace(4, lambda x: 0.0), ValueError, "softmax_scale must be positive and finite, got 0.0"),
    Bad("mla_decode", "scale NaN", replace(4, lambda x: float("nan")), ValueError, "softmax_scale must be positive and finite, got nan"),
    Bad("mla_decode", "uniform q with offsets", replace(6, lambda _: torch.zeros(3, dtype=torch.int32)), ValueError, r"q must be \[total_q, h, head_dim_k\], got \[2, 2, 5, 576\]"),
    Bad("mla_decode", "no value channels", replace(7, lambda d: 0), ValueError, "head_dim_v must be from 1 to head_dim_k = 576, got 0"),
    Bad("mla_decode", "more value than key channels", replace(7, lambda d: 577), ValueError, "head_dim_v must be from 1 to head_dim_k = 576, got 577"),
    Bad("mla_decode", "a scale for a bfloat16 cache", lambda *rest: (*rest, False, 2.0), ValueError, "kv_scale must be 1, since kv_cache is not float8_e4m3fn, got 2.0"),
    Bad("mla_decode", "a cache of scale zero", lambda q, c, *rest: (q, c.to(torch.float8_e4m3fn), *rest, False, 0.0), ValueError, "kv_scale must be from 1e-30 to 1e30, got 0.0"),
    Bad("mla_decode", "a cache of scale NaN", lambda q, c, *rest: (q, c.to(torch.float8_e4m3fn), *rest, False, float("nan")), ValueError, "kv_scale must be from 1e-30 to 1e30, got nan"),
    Bad("mla_decode", "one scale, rows too short", lambda q, c, *rest: (q, c[..., :560].to(torch.float8_e4m3fn), *rest), ValueError, r"kv_cache must be \[num_pages, page_size, 576\], got \[6, 4, 560\]"),
    Bad("mla_decode_out", "FP8 cache for another model", replace(0, lambda q: q[..., :512]), ValueError, r"q must be \[total_q, h, 576\], got \[5, 3, 512\]"),
    Bad("mla_decode_out", "FP8 format with other values", replace(4, lambda o: o[..., :256]), ValueError, "head_dim_v must be 512 for the FP8 formats, got 256"),
    Bad("mla_decode_out", "out one row short", replace(4, lambda o: o[1:]), ValueError, r"out must be \[5, 3, head_dim_v\], got \[4, 3, 512\]"),
    Bad("mla_decode_out", "out in another dtype", replace(4, lambda o: o.float()), TypeError, "out must be bfloat16, got float32"),
    Bad("mla_decode_out", "out overlaps itself", replace(4, lambda o: o[:1].expand(5, 3, 512)), ValueError, "out must be free of internal overlap"),
    Bad("mla_decode_out", "out is q", lambda q, c, t, s, out, *rest: (q, c, t, s, q[..., :512], *rest), ValueError, "out must be apart from the inputs in memory"),
    Bad("mla_decode_out", "lse with heads first", replace(5, lambda x: x.T), ValueError, r"lse must be \[5, 3\], got \[3, 5\]"),
    Bad("mla_decode_out", "lse not contiguous", replace(5, lambda x: x.T.contiguous().T), ValueError, "lse must be contiguous, got strides"),
    Bad("mla_decode_out", "lse in bfloat16", replace(5, lambda x: x.bfloat16()), TypeError, "lse must be float32, got bfloat16"),
    Bad("mla_decode_out", "lse inside out", lambda q, c, t, s, out, lse, *rest: (q, c, t, s, out, out.view(torch.float32).view(-1)[:15].view(5, 3), *rest), ValueError, "lse must be apart from the inputs in memory"),
    Bad("mla_decode_out", "an offset too few", replace(8, lambda c: c[1:]), ValueError, r"cu_seqlens_q must be \[3\], got \[2\]"),
    Bad("mla_decode_out", "offsets in int64", replace(8, lambda c: c.long()), TypeError, "cu_seqlens_q must be int32, got int64"),
    Bad("mla_prefill", "k with fewer heads", replace(1, lambda k: k[:, :1]), ValueError, r"k must be \[total_k, 2, 192\], got \[9, 1, 192\]"),
    Bad("mla_prefill", "k of another width", replace(1, lambda k: k[..., :128]), ValueError, r"k must be \[total_k, 2, 192\], got \[9, 2, 128\]"),
    Bad("mla_prefill", "k in float32", replace(1, lambda k: k.float()), TypeError, "k must be bfloat16, got float32"),
    Bad("mla_prefill", "v one row short", replace(2, lambda v: v[1:]), ValueError, r"v must be \[9, 2, head_dim_v\], got \[8, 2, 128\]"),
    Bad("mla_prefill", "v without channels", replace(2, lambda v: v[..., :0]), ValueError, "head_dim_v must be at least 1, got 0"),
    Bad("mla_prefill", "q with a batch", replace(0, lambda q: q[None]), ValueError, r"q must be \[total_q, h, head_dim_k\], got \[1, 7, 2, 192\]"),
    Bad("mla_prefill", "q misaligned", replace(0, lambda q: q.repeat(1, 1, 2)[..., 1:193]), ValueError, "q must be aligned to 16 bytes, got a storage offset of 2 bytes"),
    Bad("mla_prefill", "no offsets", replace(3, lambda c: c[:0]), ValueError, "cu_seqlens_q must be of one or more offsets, got 0"),
    Bad("mla_prefill", "offsets of different batches", replace(4, lambda c: c[1:]), ValueError, r"cu_seqlens_k must be \[3\], got \[2\]"),
    Bad("mla_prefill", "offsets in int64", replace(4, lambda c: c.long()), TypeError, "cu_seqlens_k must be int32, got int64"),
    Bad("mla_prefill", "scale infinite", replace(5, lambda x: float("inf")), ValueError, "softmax_scale must be positive and finite, got inf"),
    Bad("merge_attn_states", "out_a a vector", replace(0, lambda o: o[0, 0]), ValueError, r"out_a must be of 2 or more dimensions, got \[512\]"),
    Bad("merge_attn_states", "out_a in FP8", replace(0, lambda o: o.to(torch.float8_e4m3fn)), TypeError, "out_a must be bfloat16 or float16 or float32, got float8_e4m3fn"),
    Bad("merge_attn_states", "lse_a with heads first", replace(1, lambda x: x.T), ValueError, r"lse_a must be \[5, 3\], got \[3, 5\]"),
    Bad("merge_attn_states", "lse_a in float16", replace(1, lambda x: x.half()), TypeError, "lse_a must be float32, got float16"),
    Bad("merge_attn_states", "out_b of another shape", replace(2, lambda o: o[:4]), ValueError, r"out_b must be \[5, 3, 512\], got \[4, 3, 512\]"),
    Bad("merge_attn_states", "out_b in another dtype", replace(2, lambda o: o.half()), TypeError, "out_b must be bfloat16, got float16"),
    Bad("merge_attn_states", "out_b transposed", replace(2, lambda o: o.mT.contiguous().mT), ValueError, "out_b must be contiguous in its last dimension"),
    Bad("merge_attn_states", "lse_b of another rank", replace(3, lambda x: x[None]), ValueError, r"lse_b must be \[5, 3\], got \[1, 5, 3\]"),
    Bad("merge_attn_states", "lse_b is no tensor", replace(3, lambda x: 0.0), TypeError, "lse_b must be a Tensor, got float"),
]  # fmt: skip
