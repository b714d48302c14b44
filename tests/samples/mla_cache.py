"""Calls of the paged latent cache."""

from __future__ import annotations

import torch

from deepseek_ops import rope_cos_sin
from tests.samples import Arguments, Bad, replace


def _mla_cache_write(device: str) -> Arguments:
    """Four tokens, one of them padding, into an FP8 cache."""
    kv_c, k_pe = torch.randn(4, 512, device=device).bfloat16(), torch.randn(4, 64, device=device).bfloat16()
    positions = torch.tensor([3, 0, 9, 12], device=device)
    slots = torch.tensor([5, -1, 0, 11], device=device)
    kv_cache = torch.zeros(3, 4, 656, dtype=torch.uint8, device=device)
    norm_weight = torch.rand(512, device=device).bfloat16() + 0.5
    return kv_c, k_pe, positions, rope_cos_sin(16, 64, device=device), slots, kv_cache, norm_weight, 1e-6, True


def _mla_cache_gather(device: str) -> Arguments:
    kv_cache = torch.randn(3, 4, 576, device=device).bfloat16()
    block_table = torch.tensor([[2, 0], [1, 7]], dtype=torch.int32, device=device)
    return kv_cache, block_table, torch.tensor([0, 3, 9], dtype=torch.int32, device=device), 10, torch.float32


SAMPLES = {"mla_cache_write": _mla_cache_write, "mla_cache_gather": _mla_cache_gather}


BAD_INPUT = [
    Bad("mla_cache_write", "kv_c in FP8", replace(0, lambda x: x.to(torch.float8_e4m3fn)), TypeError, "kv_c must be bfloat16 or float16 or float32, got float8_e4m3fn"),
    Bad("mla_cache_write", "kv_c too narrow for the FP8 format", replace(0, lambda x: x[:, :256]), ValueError, r"kv_c must be \[t, 512\], got \[4, 256\]"),
    Bad("mla_cache_write", "kv_c transposed", replace(0, lambda x: x.T.contiguous().T), ValueError, "kv_c must be contiguous in its last dimension"),
    Bad("mla_cache_write", "k_pe one row short", replace(1, lambda x: x[1:]), ValueError, r"k_pe must be \[4, 64\], got \[3, 64\]"),
    Bad("mla_cache_write", "k_pe in another dtype", replace(1, lambda x: x.half()), TypeError, "k_pe must be bfloat16, got float16"),
    Bad("mla_cache_write", "positions in float32", replace(2, lambda x: x.float()), TypeError, "positions must be int32 or int64, got float32"),
    Bad("mla_cache_write", "a position too few", replace(2, lambda x: x[1:]), ValueError, r"positions must be \[4\], got \[3\]"),
    Bad("mla_cache_write", "positions with gaps", replace(2, lambda x: x.repeat(2)[::2]), ValueError, "positions must be contiguous, got strides"),
    Bad("mla_cache_write", "cosines in bfloat16", replace(3, lambda x: x.bfloat16()), TypeError, "cos_sin must be float32, got bfloat16"),
    Bad("mla_cache_write", "cosines only", replace(3, lambda x: x[:, :32]), ValueError, r"cos_sin must be \[max_position, 64\], got \[16, 32\]"),
    Bad("mla_cache_write", "an empty table of cosines", replace(3, lambda x: x[:0]), ValueError, "max_position must be at least 1, got 0"),
    Bad("mla_cache_write", "slots in int16", replace(4, lambda x: x.short()), TypeError, "slot_mapping must be int32 or int64, got int16"),
    Bad("mla_cache_write", "slots of another batch", replace(4, lambda x: x[:2]), ValueError, r"slot_mapping must be \[4\], got \[2\]"),
    Bad("mla_cache_write", "cache is no tensor", replace(5, lambda x: None), TypeError, "kv_cache must be a Tensor, got NoneType"),
    Bad("mla_cache_write", "cache in another dtype", replace(5, lambda x: x.new_zeros(3, 4, 576, dtype=torch.float16)), TypeError, "kv_cache must be bfloat16 or uint8 or float8_e4m3fn, got float16"),
    Bad("mla_cache_write", "cache of the wrong width", replace(5, lambda x: x.new_zeros(3, 4, 512, dtype=torch.bfloat16)), ValueError, r"kv_cache must be \[num_pages, page_size, 576\], got \[3, 4, 512\]"),
    Bad("mla_cache_write", "pages without rows", replace(5, lambda x: x[:, :0]), ValueError, "page_size must be at least 1, got 0"),
    Bad("mla_cache_write", "cache overlaps itself", replace(5, lambda x: x[:1].expand(3, 4, 656)), ValueError, "kv_cache must be free of internal overlap"),
    Bad("mla_cache_write", "cache over the latents", lambda kv_c, *rest: (kv_c, *rest[:4], kv_c.view(torch.uint8).view(-1)[:1312].view(1, 2, 656), *rest[5:]), ValueError, "kv_cache must be apart from the inputs in memory"),
    Bad("mla_cache_write", "odd rotated channels", lambda kv_c, k_pe, p, cs, s, c, *rest: (kv_c, k_pe[:, :63], p, cs, s, kv_c.new_zeros(3, 4, 576), *rest), ValueError, "rope_dim must be positive and even, got 63"),
    Bad("mla_cache_write", "norm_weight one short", replace(6, lambda x: x[1:]), ValueError, r"norm_weight must be \[512\], got \[511\]"),
    Bad("mla_cache_write", "norm_weight in float16", replace(6, lambda x: x.half()), TypeError, "norm_weight must be bfloat16 or float32, got float16"),
    Bad("mla_cache_write", "eps zero", replace(7, lambda x: 0.0), ValueError, "eps must be positive and finite, got 0.0"),
    Bad("mla_cache_write", "a scale for rows that have their own", lambda *rest: (*rest, 0.5), ValueError, "kv_scale must be 1, since kv_cache is not float8_e4m3fn, got 0.5"),
    Bad("mla_cache_write", "an infinite scale", lambda *a: (*a[:5], torch.zeros(3, 4, 576, device=a[5].device).to(torch.float8_e4m3fn), *a[6:], float("inf")), ValueError, "kv_scale must be from 1e-30 to 1e30, got inf"),
    Bad("mla_cache_gather", "a negative scale", lambda c, *rest: (c.to(torch.float8_e4m3fn), *rest, -1.0), ValueError, "kv_scale must be from 1e-30 to 1e30, got -1.0"),
    Bad("mla_cache_gather", "one scale, rows too short", lambda c, *rest: (c[..., :48].to(torch.float8_e4m3fn), *rest), ValueError, r"kv_cache must be \[num_pages, page_size, 576\], got \[3, 4, 48\]"),
    Bad("mla_cache_gather", "cache in int8", replace(0, lambda x: x.to(torch.int8)), TypeError, "kv_cache must be bfloat16 or float16 or float32 or uint8 or float8_e4m3fn, got int8"),
    Bad("mla_cache_gather", "uint8 rows of the wrong width", replace(0, lambda x: x.to(torch.uint8)), ValueError, r"kv_cache must be \[num_pages, page_size, 656\], got \[3, 4, 576\]"),
    Bad("mla_cache_gather", "cache without pages", replace(0, lambda x: x[0]), ValueError, r"kv_cache must be \[num_pages, page_size, d\], got \[4, 576\]"),
    Bad("mla_cache_gather", "cache transposed", replace(0, lambda x: x.mT.contiguous().mT), ValueError, "kv_cache must be contiguous in its last dimension"),
    Bad("mla_cache_gather", "table in int64", replace(1, lambda x: x.long()), TypeError, "block_table must be int32, got int64"),
    Bad("mla_cache_gather", "table flat", replace(1, lambda x: x.flatten()), ValueError, r"block_table must be \[b, max_pages\], got \[4\]"),
    Bad("mla_cache_gather", "lengths for offsets", replace(2, lambda x: x[1:]), ValueError, r"cu_seqlens must be \[3\], got \[2\]"),
    Bad("mla_cache_gather", "offsets in int64", replace(2, lambda x: x.long()), TypeError, "cu_seqlens must be int32, got int64"),
    Bad("mla_cache_gather", "a negative total", replace(3, lambda x: -1), ValueError, "total must be not negative, got -1"),
    Bad("mla_cache_gather", "into integers", replace(4, lambda x: torch.int32), TypeError, "out_dtype must be bfloat16 or float16 or float32, got int32"),
]  # fmt: skip
