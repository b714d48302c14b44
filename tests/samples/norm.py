"""Calls of the norms."""

import torch

from tests.samples import Bad


def _x(device):
    return torch.randn(5, 300, device=device).bfloat16()


def _weight(device):
    return torch.rand(300, device=device).bfloat16() + 0.5


SAMPLES = {
    "rms_norm": lambda device: (_x(device), _weight(device), 1e-6),
    "add_rms_norm": lambda device: (_x(device), _x(device), _weight(device).float(), 1e-6),
    "rms_norm_cast_to_fp8": lambda device: (_x(device), _weight(device), 1e-6, True, True),
    "add_rms_norm_cast_to_fp8": lambda device: (_x(device), _x(device), _weight(device), 1e-6, False, False),
}

BAD_INPUT = [
    Bad("rms_norm", "x is no tensor", lambda x, w, e: (1.0, w, e), TypeError, "x must be a Tensor, got float"),
    Bad("rms_norm", "integers", lambda x, w, e: (x.int(), w, e), TypeError, "x must be bfloat16 or float16 or float32, got int32"),
    Bad("rms_norm", "a scalar", lambda x, w, e: (x[0, 0], w, e), ValueError, r"x must be of 1 or more dimensions, got \[\]"),
    Bad("rms_norm", "x transposed", lambda x, w, e: (x.T.contiguous().T, w, e), ValueError, "x must be contiguous in its last dimension, got strides"),
    Bad("rms_norm", "weight one short", lambda x, w, e: (x, w[1:], e), ValueError, r"weight must be \[300\], got \[299\]"),
    Bad("rms_norm", "weight of rank 2", lambda x, w, e: (x, w[None], e), ValueError, r"weight must be \[300\], got \[1, 300\]"),
    Bad("rms_norm", "weight of another half precision", lambda x, w, e: (x, w.half(), e), TypeError, "weight must be bfloat16 or float32, got float16"),
    Bad("rms_norm", "x float32, weight bfloat16", lambda x, w, e: (x.float(), w, e), TypeError, "weight must be float32, got bfloat16"),
    Bad("rms_norm", "weight with gaps", lambda x, w, e: (x, w.repeat(2)[::2], e), ValueError, "weight must be contiguous in its last dimension, got strides"),
    Bad("rms_norm", "weight on another device", lambda x, w, e: (x, w.to("meta"), e), ValueError, "weight must be on .* like x, got meta"),
    Bad("rms_norm", "sparse", lambda x, w, e: (x.to_sparse(), w, e), ValueError, "x must be a plain strided tensor, got sparse_coo"),
    Bad("rms_norm", "eps zero", lambda x, w, e: (x, w, 0.0), ValueError, "eps must be positive and finite, got 0.0"),
    Bad("rms_norm", "eps NaN", lambda x, w, e: (x, w, float("nan")), ValueError, "eps must be positive and finite, got nan"),
    Bad("add_rms_norm", "residual one row short", lambda x, r, w, e: (x, r[1:], w, e), ValueError, r"residual must be \[5, 300\], got \[4, 300\]"),
    Bad("add_rms_norm", "residual to be broadcast", lambda x, r, w, e: (x, r[0], w, e), ValueError, r"residual must be \[5, 300\], got \[300\]"),
    Bad("add_rms_norm", "residual in float32", lambda x, r, w, e: (x, r.float(), w, e), TypeError, "residual must be bfloat16, got float32"),
    Bad("add_rms_norm", "residual transposed", lambda x, r, w, e: (x, r.T.contiguous().T, w, e), ValueError, "residual must be contiguous in its last dimension"),
    Bad("add_rms_norm", "residual missing", lambda x, r, w, e: (x, None, w, e), TypeError, "residual must be a Tensor, got NoneType"),
    Bad("add_rms_norm", "eps negative", lambda x, r, w, e: (x, r, w, -1e-6), ValueError, "eps must be positive and finite, got -1e-06"),
    Bad("rms_norm_cast_to_fp8", "a vector", lambda x, *rest: (x[0], *rest), ValueError, r"x must be of 2 or more dimensions, got \[300\]"),
    Bad("rms_norm_cast_to_fp8", "x quantized already", lambda x, *rest: (x.to(torch.float8_e4m3fn), *rest), TypeError, "x must be bfloat16 or float16 or float32, got float8_e4m3fn"),
    Bad("rms_norm_cast_to_fp8", "weight of the wrong width", lambda x, w, *rest: (x, w[:128], *rest), ValueError, r"weight must be \[300\], got \[128\]"),
    Bad("rms_norm_cast_to_fp8", "eps infinite", lambda x, w, e, *rest: (x, w, float("inf"), *rest), ValueError, "eps must be positive and finite, got inf"),
    Bad("add_rms_norm_cast_to_fp8", "a vector", lambda x, r, *rest: (x[0], r[0], *rest), ValueError, r"x must be of 2 or more dimensions, got \[300\]"),
    Bad("add_rms_norm_cast_to_fp8", "residual of another dtype", lambda x, r, *rest: (x, r.half(), *rest), TypeError, "residual must be bfloat16, got float16"),
    Bad("add_rms_norm_cast_to_fp8", "residual narrower", lambda x, r, *rest: (x, r[:, 1:], *rest), ValueError, r"residual must be \[5, 300\], got \[5, 299\]"),
    Bad("add_rms_norm_cast_to_fp8", "x narrower than the weight", lambda x, r, *rest: (x[:, :256], r[:, :256], *rest), ValueError, r"weight must be \[256\], got \[300\]"),
]  # fmt: skip
