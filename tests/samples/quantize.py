"""Calls of the quantization ops."""

import torch

from deepseek_ops import per_block_cast_to_fp8, per_token_cast_to_fp8
from tests.samples import Bad

SAMPLES = {
    "cast_to_fp8": lambda device: (torch.randn(3, 40, device=device),),
    "per_token_cast_to_fp8": lambda device: (torch.randn(5, 300, device=device).bfloat16(), True, True, 1e-4),
    "per_token_cast_from_fp8": lambda device: (*per_token_cast_to_fp8(torch.randn(5, 300, device=device)), torch.bfloat16),
    "per_block_cast_to_fp8": lambda device: (torch.randn(200, 300, device=device).bfloat16(), False, 1e-4),
    "per_block_cast_from_fp8": lambda device: (*per_block_cast_to_fp8(torch.randn(200, 300, device=device)), torch.float32),
    "to_mn_major_tma_aligned": lambda device: (torch.randn(5, 3, device=device),),
}  # fmt: skip

BAD_INPUT = [
    Bad("cast_to_fp8", "integers", lambda x: (x.int(),), TypeError, "x must be bfloat16 or float16 or float32, got int32"),
    Bad("per_token_cast_to_fp8", "a vector", lambda x, *rest: (x[0], *rest), ValueError, r"x must be of 2 or more dimensions, got \[300\]"),
    Bad("per_token_cast_to_fp8", "float64", lambda x, *rest: (x.double(), *rest), TypeError, "x must be bfloat16 or float16 or float32, got float64"),
    Bad("per_token_cast_to_fp8", "transposed", lambda x, *rest: (x.T, *rest), ValueError, "x must be contiguous in its last dimension"),
    Bad("per_token_cast_to_fp8", "a floor of zero", lambda x, u, mn, floor: (x, u, mn, 0.0), ValueError, "amax_floor must be at least 1e-30, got 0.0"),
    Bad("per_token_cast_to_fp8", "sparse", lambda x, *rest: (x.to_sparse(), *rest), ValueError, "x must be a plain strided tensor, got sparse_coo"),
    Bad("per_token_cast_from_fp8", "scales of the wrong shape", lambda q, sf, d: (q, sf[:, 1:], d), ValueError, r"sf must be \[5, 3\], got \[5, 2\]"),
    Bad("per_token_cast_from_fp8", "into integers", lambda q, sf, d: (q, sf, torch.int32), TypeError, "out_dtype must be bfloat16 or float16 or float32, got int32"),
    Bad("per_block_cast_to_fp8", "a list", lambda x, *rest: ([1.0], *rest), TypeError, "x must be a Tensor, got list"),
    Bad("per_block_cast_to_fp8", "a vector", lambda x, *rest: (x[0], *rest), ValueError, r"x must be of 2 or more dimensions, got \[300\]"),
    Bad("per_block_cast_from_fp8", "scales of the wrong shape", lambda q, sf, d: (q, sf[:1], d), ValueError, r"sf must be \[2, 3\], got \[1, 3\]"),
    Bad("to_mn_major_tma_aligned", "half precision", lambda sf: (sf.half(),), TypeError, "sf must be float32, got float16"),
]  # fmt: skip
