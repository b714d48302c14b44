"""Calls of the mixture-of-experts ops."""

import torch

from deepseek_ops import moe_gate, moe_mapping
from tests.samples import Bad


def _moe_gate(device):
    return torch.randn(5, 32, device=device), 0.1 * torch.randn(32, device=device), 6, 8, 4, "sigmoid", True, 2.5


def _topk(device):
    return moe_gate(torch.randn(7, 16, device=device), None, num_topk=4)


def _moe_mapping(device):
    return _topk(device)[1], 12, 8  # four of the 16 experts are another rank's


def _moe_permute(device):
    return torch.randn(7, 40, device=device).bfloat16(), moe_mapping(*_moe_mapping(device)[:2], alignment=8)[0]


def _moe_unpermute(device):
    topk_weights, topk_idx = _topk(device)
    token_idx, row_idx, _, _ = moe_mapping(topk_idx, 12, alignment=8)
    return torch.randn(token_idx.shape[0], 40, device=device).bfloat16(), row_idx, topk_weights


SAMPLES = {
    "moe_gate": _moe_gate,
    "moe_mapping": _moe_mapping,
    "moe_permute": _moe_permute,
    "moe_unpermute": _moe_unpermute,
}

BAD_INPUT = [
    Bad("moe_gate", "logits in bfloat16", lambda x, *rest: (x.bfloat16(), *rest), TypeError, "logits must be float32, got bfloat16"),
    Bad("moe_gate", "logits of one token without its dimension", lambda x, *rest: (x[0], *rest), ValueError, r"logits must be \[t, num_experts\], got \[32\]"),
    Bad("moe_gate", "logits transposed", lambda x, *rest: (x.T.contiguous().T, *rest), ValueError, "logits must be contiguous in its last dimension, got strides"),
    Bad("moe_gate", "logits missing", lambda x, *rest: (None, *rest), TypeError, "logits must be a Tensor, got NoneType"),
    Bad("moe_gate", "bias one short", lambda x, b, *rest: (x, b[1:], *rest), ValueError, r"bias must be \[32\], got \[31\]"),
    Bad("moe_gate", "bias in bfloat16", lambda x, b, *rest: (x, b.bfloat16(), *rest), TypeError, "bias must be float32, got bfloat16"),
    Bad("moe_gate", "bias a number", lambda x, b, *rest: (x, 0.5, *rest), TypeError, "bias must be a Tensor, got float"),
    Bad("moe_gate", "bias with gaps", lambda x, b, *rest: (x, b.repeat(2)[::2], *rest), ValueError, "bias must be contiguous, got strides"),
    Bad("moe_gate", "bias on another device", lambda x, b, *rest: (x, b.to("meta"), *rest), ValueError, "bias must be on .* like logits, got meta"),
    Bad("moe_gate", "no choice", lambda x, b, k, *rest: (x, b, 0, *rest), ValueError, r"num_topk must be in 1\.\.16, the experts of the kept groups, got 0"),
    Bad("moe_gate", "more choices than the kept groups have", lambda x, b, k, *rest: (x, b, 17, *rest), ValueError, r"num_topk must be in 1\.\.16, .*, got 17"),
    Bad("moe_gate", "no expert", lambda x, b, *rest: (x[:, :0], b[:0], *rest), ValueError, r"num_topk must be in 1\.\.0, .*, got 6"),
    Bad("moe_gate", "groups that do not divide", lambda x, b, k, g, *rest: (x, b, k, 5, *rest), ValueError, "num_groups must be a divisor of 32 experts, got 5"),
    Bad("moe_gate", "no group", lambda x, b, k, g, *rest: (x, b, k, 0, *rest), ValueError, "num_groups must be a divisor of 32 experts, got 0"),
    Bad("moe_gate", "a negative number of groups", lambda x, b, k, g, *rest: (x, b, k, -8, *rest), ValueError, "num_groups must be a divisor of 32 experts, got -8"),
    Bad("moe_gate", "more groups kept than there are", lambda x, b, k, g, kg, *rest: (x, b, k, g, 9, *rest), ValueError, r"num_topk_groups must be in 1\.\.8, got 9"),
    Bad("moe_gate", "no group kept", lambda x, b, k, g, kg, *rest: (x, b, k, g, 0, *rest), ValueError, r"num_topk_groups must be in 1\.\.8, got 0"),
    Bad("moe_gate", "an unknown scoring function", lambda x, b, k, g, kg, s, *rest: (x, b, k, g, kg, "relu", *rest), ValueError, "scoring_func must be 'sigmoid' or 'softmax', got 'relu'"),
    Bad("moe_mapping", "int64 indices", lambda i, *rest: (i.long(), *rest), TypeError, "topk_idx must be int32, got int64"),
    Bad("moe_mapping", "weights for indices", lambda i, *rest: (i.float(), *rest), TypeError, "topk_idx must be int32, got float32"),
    Bad("moe_mapping", "a vector", lambda i, *rest: (i[0], *rest), ValueError, r"topk_idx must be \[t, num_topk\], got \[4\]"),
    Bad("moe_mapping", "some of the columns", lambda i, *rest: (i[:, :2], *rest), ValueError, "topk_idx must be contiguous, got strides"),
    Bad("moe_mapping", "no tensor", lambda i, *rest: ([[0]], *rest), TypeError, "topk_idx must be a Tensor, got list"),
    Bad("moe_mapping", "no expert", lambda i, e, a: (i, 0, a), ValueError, "num_experts must be 1 or more, got 0"),
    Bad("moe_mapping", "alignment zero", lambda i, e, a: (i, e, 0), ValueError, "alignment must be 1 or more, got 0"),
    Bad("moe_mapping", "alignment negative", lambda i, e, a: (i, e, -128), ValueError, "alignment must be 1 or more, got -128"),
    Bad("moe_mapping", "an alignment that asks for too many rows", lambda i, e, a: (i, e, 2**30), ValueError, r"topk_idx must be small enough for its rows to fit int32, got 12\d* rows"),
    Bad("moe_permute", "x is no tensor", lambda x, i: (None, i), TypeError, "x must be a Tensor, got NoneType"),
    Bad("moe_permute", "x of rank 3", lambda x, i: (x[None], i), ValueError, r"x must be \[t, d\], got \[1, 7, 40\]"),
    Bad("moe_permute", "x of rank 1", lambda x, i: (x[0], i), ValueError, r"x must be \[t, d\], got \[40\]"),
    Bad("moe_permute", "x sparse", lambda x, i: (x.to_sparse(), i), ValueError, "x must be a plain strided tensor, got sparse_coo"),
    Bad("moe_permute", "int64 indices", lambda x, i: (x, i.long()), TypeError, "token_idx must be int32, got int64"),
    Bad("moe_permute", "a matrix of indices", lambda x, i: (x, i[None]), ValueError, r"token_idx must be \[rows\], got \[1, "),
    Bad("moe_permute", "every second index", lambda x, i: (x, i[::2]), ValueError, "token_idx must be contiguous, got strides"),
    Bad("moe_permute", "indices on another device", lambda x, i: (x, i.to("meta")), ValueError, "token_idx must be on .* like x, got meta"),
    Bad("moe_unpermute", "y quantized", lambda y, *rest: (y.to(torch.float8_e4m3fn), *rest), TypeError, "y must be bfloat16 or float16 or float32, got float8_e4m3fn"),
    Bad("moe_unpermute", "y of rank 1", lambda y, *rest: (y[0], *rest), ValueError, r"y must be \[rows, d\], got \[40\]"),
    Bad("moe_unpermute", "y transposed", lambda y, *rest: (y.T.contiguous().T, *rest), ValueError, "y must be contiguous in its last dimension, got strides"),
    Bad("moe_unpermute", "int64 rows", lambda y, i, w: (y, i.long(), w), TypeError, "row_idx must be int32, got int64"),
    Bad("moe_unpermute", "some of the rows", lambda y, i, w: (y, i[:, :2], w[:, :2].contiguous()), ValueError, "row_idx must be contiguous, got strides"),
    Bad("moe_unpermute", "flat rows", lambda y, i, w: (y, i.flatten(), w), ValueError, r"row_idx must be \[t, num_topk\], got \[28\]"),
    Bad("moe_unpermute", "weights in bfloat16", lambda y, i, w: (y, i, w.bfloat16()), TypeError, "topk_weights must be float32, got bfloat16"),
    Bad("moe_unpermute", "weights of fewer tokens", lambda y, i, w: (y, i, w[1:]), ValueError, r"topk_weights must be \[7, 4\], got \[6, 4\]"),
    Bad("moe_unpermute", "weights transposed", lambda y, i, w: (y, i, w.T.contiguous().T), ValueError, "topk_weights must be contiguous, got strides"),
    Bad("moe_unpermute", "weights missing", lambda y, i, w: (y, i, None), TypeError, "topk_weights must be a Tensor, got NoneType"),
]  # fmt: skip
