"""The shapes that DeepSeek models run, each with where it comes from, and what a call at them computes and moves.

Every list has a twin of a few small stand-ins, which `for_this_machine` takes where there is no GPU: there the
benches only show that they run and that what they time is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from deepseek_ops.numeric import BLOCK, ceil_div

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

Shape = TypeVar("Shape")


def for_this_machine(full: Sequence[Shape], stand_ins: Sequence[Shape]) -> Sequence[Shape]:
    return full if GPU else stand_ins


# ---------------------------------------------------------------------------------------------- dense FP8 GEMM


@dataclass(frozen=True)
class Gemm:
    """`[m, k] x [n, k]`, both FP8 with fine-grained scales, bfloat16 out."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.m} x {self.n} x {self.k}"

    @property
    def flops(self) -> float:
        return 2 * self.m * self.n * self.k

    @property
    def num_bytes(self) -> float:
        blocks = ceil_div(self.k, BLOCK)
        scales = 4 * blocks * (self.m + ceil_div(self.n, BLOCK))
        return self.k * (self.m + self.n) + scales + 2 * self.m * self.n


# DeepSeek-V3's weights, [n, k].
V3_WEIGHTS = (
    (2112, 7168),  # q_a_proj and kv_a_proj_with_mqa as one: 1536 + 512 + 64 rows
    (24576, 1536),  # q_b_proj: 128 heads x 192
    (32768, 512),  # kv_b_proj: 128 heads x 256
    (7168, 16384),  # o_proj
    (4096, 7168),  # gate_proj and up_proj of one expert
    (7168, 2048),  # down_proj of one expert
)
DENSE = (
    *(Gemm(m, n, k) for m in (1, 64, 128, 4096) for n, k in V3_WEIGHTS),
    Gemm(8192, 7168, 16384),
    Gemm(8192, 8192, 8192),
)
SMALL_M = tuple(Gemm(m, n, k) for m in (8, 16, 31) for n, k in V3_WEIGHTS)
"""Decoding at batch sizes between those of DENSE, where operand-swapping kernels compete."""
DENSE_STAND_INS = (Gemm(1, 264, 272), Gemm(4, 256, 512), Gemm(130, 128, 128))


# -------------------------------------------------------------------------------------------- grouped FP8 GEMM


@dataclass(frozen=True)
class GroupedGemm:
    """`groups` GEMMs of about `rows` tokens each: `[rows, k] x [n, k]`."""

    groups: int
    rows: int
    n: int
    k: int
    max_m: int = 0
    """Rows that the masked layout has room for in each group; 0 for the contiguous layout."""

    def __str__(self) -> str:
        return f"{self.groups} x {self.rows} x {self.n} x {self.k}"

    def counts(self) -> list[int]:
        """Tokens of each group: between 0.7 and 1.3 times `rows`, the same ones every time."""
        generator = torch.Generator().manual_seed(0)
        spread = 0.7 + 0.6 * torch.rand(self.groups, generator=generator)
        return [max(1, int(self.rows * float(x))) for x in spread]

    @property
    def flops(self) -> float:
        return 2 * sum(self.counts()) * self.n * self.k

    @property
    def num_bytes(self) -> float:
        one = [Gemm(m, self.n, self.k).num_bytes for m in self.counts()]
        return sum(one)


EXPERT_WEIGHTS = V3_WEIGHTS[-2:]
CONTIGUOUS = tuple(GroupedGemm(g, rows, n, k) for g, rows in ((4, 8192), (8, 4096)) for n, k in EXPERT_WEIGHTS)
"""Prefill: an expert-parallel rank with 4 or 8 experts."""
MASKED = tuple(
    GroupedGemm(g, rows, n, k, max_m=4096)
    for g, rows in ((32, 192), (6, 1024), (32, 20), (6, 20))
    for n, k in EXPERT_WEIGHTS
)
"""Decoding: what dispatch leaves per expert, in buffers of fixed size."""
CONTIGUOUS_STAND_INS = (GroupedGemm(3, 40, 136, 256),)
MASKED_STAND_INS = (GroupedGemm(3, 5, 136, 256, max_m=16),)


# -------------------------------------------------------------------------------------------------- MLA decoding


@dataclass(frozen=True)
class Mla:
    """Absorbed MLA over a paged latent cache: `batch` sequences of `s_k` tokens, `s_q` queries each."""

    batch: int
    s_q: int
    s_k: int
    heads: int
    cache: str = "bf16"

    def __str__(self) -> str:
        return f"{self.batch} x {self.s_q} x {self.s_k}, {self.heads} heads, {self.cache}"

    @property
    def flops(self) -> float:
        return 2 * self.batch * self.s_q * self.heads * self.s_k * (576 + 512)

    @property
    def num_bytes(self) -> float:
        """Queries and cache read once, output written once."""
        row = {"bf16": 1152, "fp8": 656}[self.cache]
        return self.batch * (self.s_k * row + self.s_q * self.heads * 2 * (576 + 512))


MLA_GRID = tuple(
    Mla(batch, 1, s_k, heads) for heads in (16, 64, 128) for batch in (1, 16, 64) for s_k in (1024, 8192, 65536)
)
"""Heads of a rank under tensor parallelism 8, 2 and 1; few, some and many requests; short to long contexts."""
MLA_LARGE = (Mla(128, 1, 4096, 128), Mla(128, 1, 16384, 128), Mla(128, 2, 4096, 128), Mla(128, 2, 16384, 128))
"""The grid of FlashMLA's own benchmark: 128 requests, with and without a draft token."""
MLA_DRAFTS = (Mla(32, 1, 4096, 8), Mla(32, 4, 4096, 16), Mla(32, 4, 4096, 32))
"""Draft tokens and small ranks."""
MLA = MLA_GRID + MLA_LARGE + MLA_DRAFTS
MLA_FP8 = tuple(Mla(x.batch, x.s_q, x.s_k, x.heads, "fp8") for x in MLA if x.s_k >= 4096)
MLA_STAND_INS = (Mla(2, 1, 70, 4), Mla(2, 2, 130, 16), Mla(1, 1, 64, 8, "fp8"))


# ------------------------------------------------------------------------- quantization, norms, experts, by rows


@dataclass(frozen=True)
class Rows:
    """`m` tokens of `k` channels."""

    m: int
    k: int

    def __str__(self) -> str:
        return f"{self.m} x {self.k}"


HIDDEN = 7168
NUM_EXPERTS = 256
NUM_TOPK = 8
QUANTIZE = (
    Rows(1, HIDDEN),  # one token
    Rows(64, HIDDEN),  # 1 MB of bfloat16
    Rows(128, HIDDEN),
    Rows(4096, 512),  # the latent before kv_b_proj
    Rows(4096, 1536),  # the query latent before q_b_proj
    Rows(4096, 2048),  # an expert's hidden channels
    Rows(4096, HIDDEN),
    Rows(4096, 16384),  # attention's output before o_proj
    Rows(32768, HIDDEN),  # 470 MB
)
NORM = (Rows(1, HIDDEN), Rows(64, HIDDEN), Rows(128, HIDDEN), Rows(4096, HIDDEN), Rows(4096, 1536), Rows(4096, 512))
ACTIVATION = (Rows(8, 2048), Rows(512, 2048), Rows(1024, 18432), Rows(32768, 2048))
"""Rows after gate_up: routed experts (2048 channels each half), and the dense layers' 18432."""
TOKENS = (1, 64, 128, 4096)
"""Tokens of a step that go through the gate and the permutation, 8 of 256 experts each."""
ROWS_STAND_INS = (Rows(1, 128), Rows(5, 384))
TOKENS_STAND_INS = (1, 7)
