"""Calls of the activations."""

import torch

from tests.samples import Bad

SAMPLES = {
    "silu_mul": lambda device: (torch.randn(2, 5, 600, device=device).bfloat16(),),
    "silu_mul_cast_to_fp8": lambda device: (torch.randn(5, 600, device=device).bfloat16(), True, True),
}

BAD_INPUT = [
    Bad("silu_mul", "x is no tensor", lambda x: ([1.0, 2.0],), TypeError, "x must be a Tensor, got list"),
    Bad("silu_mul", "integers", lambda x: (x.long(),), TypeError, "x must be bfloat16 or float16 or float32, got int64"),
    Bad("silu_mul", "float64", lambda x: (x.double(),), TypeError, "x must be bfloat16 or float16 or float32, got float64"),
    Bad("silu_mul", "complex", lambda x: (x.to(torch.complex64),), TypeError, "x must be bfloat16 or float16 or float32, got complex64"),
    Bad("silu_mul", "an odd width", lambda x: (x[..., 1:],), ValueError, r"x must be even in its last dimension \(gate, then up\), got 599"),
    Bad("silu_mul", "a scalar", lambda x: (x[0, 0, 0],), ValueError, r"x must be of 1 or more dimensions, got \[\]"),
    Bad("silu_mul", "gate and up interleaved by a stride", lambda x: (x[..., ::2],), ValueError, "x must be contiguous in its last dimension, got strides"),
    Bad("silu_mul", "sparse", lambda x: (x.to_sparse(),), ValueError, "x must be a plain strided tensor, got sparse_coo"),
    Bad("silu_mul_cast_to_fp8", "x is None", lambda x, *rest: (None, *rest), TypeError, "x must be a Tensor, got NoneType"),
    Bad("silu_mul_cast_to_fp8", "a vector", lambda x, *rest: (x[0], *rest), ValueError, r"x must be of 2 or more dimensions, got \[600\]"),
    Bad("silu_mul_cast_to_fp8", "an odd width", lambda x, *rest: (x[:, 3:], *rest), ValueError, r"x must be even in its last dimension \(gate, then up\), got 597"),
    Bad("silu_mul_cast_to_fp8", "transposed", lambda x, *rest: (x[:, :4].T.contiguous().T, *rest), ValueError, "x must be contiguous in its last dimension, got strides"),
    Bad("silu_mul_cast_to_fp8", "quantized already", lambda x, *rest: (x.to(torch.float8_e4m3fn), *rest), TypeError, "x must be bfloat16 or float16 or float32, got float8_e4m3fn"),
]  # fmt: skip
