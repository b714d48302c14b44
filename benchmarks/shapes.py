"""The shapes that DeepSeek models run, each with where it comes from, and what a call at them computes and moves.

Every list has a twin of a few small stand-ins, which `for_this_machine` takes where there is no GPU: there the
benches only show that they run and that what they time is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from deepseek_ops.numeric import BLOCK, align, ceil_div

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
    def weight(self) -> tuple[int, int]:
        return self.n, self.k

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
LATENT = tuple(Gemm(m, 576, 7168) for m in (1, 128, 4096))
"""kv_a_proj_with_mqa by itself, 512 + 64 rows, which DeepGEMM's tests have beside V3_WEIGHTS."""
DGRAD = tuple(Gemm(4096, k, n) for n, k in (LATENT[0].weight, *V3_WEIGHTS))
"""Gradients of the inputs, from the same tests: 4096 tokens times each weight transposed."""
DENSE_STAND_INS = (Gemm(1, 264, 272), Gemm(4, 256, 512), Gemm(130, 128, 128))


# -------------------------------------------------------------------------------------------- grouped FP8 GEMM


def uneven(groups: int, rows: int) -> list[int]:
    """Tokens of each of `groups`: between 0.7 and 1.3 times `rows`, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    spread = 0.7 + 0.6 * torch.rand(groups, generator=generator)
    return [max(1, int(rows * float(x))) for x in spread]


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
        """Tokens of each group."""
        return uneven(self.groups, self.rows)

    @property
    def flops(self) -> float:
        return 2 * sum(self.counts()) * self.n * self.k

    @property
    def num_bytes(self) -> float:
        one = [Gemm(m, self.n, self.k).num_bytes for m in self.counts()]
        return sum(one)


EXPERT_WEIGHTS = V3_WEIGHTS[-2:]
LATER_EXPERT_WEIGHTS = (
    (6144, 7168),  # gate_proj and up_proj of 3072 hidden channels
    (7168, 3072),  # down_proj of the same expert
    (4096, 4096),  # gate_proj and up_proj of 2048 hidden channels, in a model of 4096
    (4096, 2048),  # down_proj of the same expert
)
"""What DeepGEMM's tests of the grouped layouts have now, in place of DeepSeek-V3's; [n, k]."""


def contiguous(weights: Sequence[tuple[int, int]]) -> tuple[GroupedGemm, ...]:
    """Prefill: an expert-parallel rank with 4 or 8 experts."""
    return tuple(GroupedGemm(g, rows, n, k) for g, rows in ((4, 8192), (8, 4096)) for n, k in weights)


def masked(weights: Sequence[tuple[int, int]]) -> tuple[GroupedGemm, ...]:
    """Decoding: what dispatch leaves per expert, in buffers of fixed size."""
    loads = ((32, 192), (6, 1024), (32, 20), (6, 20))
    return tuple(GroupedGemm(g, rows, n, k, max_m=4096) for g, rows in loads for n, k in weights)


CONTIGUOUS = contiguous(EXPERT_WEIGHTS)
CONTIGUOUS_LATER = contiguous(LATER_EXPERT_WEIGHTS)
MASKED = masked(EXPERT_WEIGHTS)
MASKED_LATER = masked(LATER_EXPERT_WEIGHTS)
CONTIGUOUS_STAND_INS = (GroupedGemm(3, 40, 136, 256),)
MASKED_STAND_INS = (GroupedGemm(3, 5, 136, 256, max_m=16),)


@dataclass(frozen=True)
class KGroupedGemm:
    """`groups` GEMMs that split the columns among them, about `k` tokens each: `[m, k] x [n, k]`, float32 out."""

    groups: int
    m: int
    n: int
    k: int
    empty: int | None = None
    """A group that got no tokens: its output is zeros."""

    def __str__(self) -> str:
        note = "" if self.empty is None else f", group {self.empty} empty"
        return f"{self.groups} x {self.m} x {self.n} x {self.k}{note}"

    def counts(self) -> list[int]:
        """Columns of each group: its tokens, padded to a multiple of 128."""
        counts = [align(count, BLOCK) for count in uneven(self.groups, self.k)]
        return [0 if i == self.empty else count for i, count in enumerate(counts)]

    @property
    def flops(self) -> float:
        return 2 * self.m * self.n * sum(self.counts())

    @property
    def num_bytes(self) -> float:
        """Both operands with a scale for 128 values, and one output for each group."""
        k_sum = sum(self.counts())
        return (self.m + self.n) * (k_sum + 4 * k_sum // BLOCK) + 4 * self.groups * self.m * self.n


WEIGHT_GRADIENTS = ((4096, 7168), (7168, 2048))
K_GROUPED = tuple(
    KGroupedGemm(groups, m, n, k) for groups, k in ((4, 8192), (8, 4096), (16, 2048)) for m, n in WEIGHT_GRADIENTS
)
"""Gradients of the experts' weights, from DeepGEMM's own tests: the sequence's tokens shared out among them."""
K_GROUPED_EMPTY = tuple(KGroupedGemm(4, m, n, 8192, empty=1) for m, n in WEIGHT_GRADIENTS)
"""The same tests' variant in which an expert was chosen by no token."""
K_GROUPED_STAND_INS = (KGroupedGemm(3, 40, 136, 256), KGroupedGemm(3, 40, 136, 256, empty=1))


# ------------------------------------------------------------------------------- grouped GEMM by offsets, decoding


@dataclass(frozen=True)
class ChosenExperts:
    """`tokens` that each choose `num_topk` of `groups` experts at random: rows times `[n, k]`, bfloat16 out."""

    tokens: int
    num_topk: int
    groups: int
    n: int
    k: int
    cast: str = "bf16"
    """Type of both operands; of "fp8" with fine-grained scales."""
    taste: float = 0.0
    """By how much all tokens like one expert better than another: 0 for loads as even as chance has them."""

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.groups} x {self.n} x {self.k}"

    @property
    def rows(self) -> int:
        return self.tokens * self.num_topk

    def counts(self) -> list[int]:
        """Rows of each group, the same ones every time."""
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(self.tokens, self.groups, generator=generator)
        scores += self.taste * torch.randn(self.groups, generator=generator)
        chosen = scores.argsort(-1)[:, : self.num_topk].flatten()
        return chosen.bincount(minlength=self.groups).tolist()

    @property
    def flops(self) -> float:
        return 2 * self.rows * self.n * self.k

    @property
    def num_bytes(self) -> float:
        """Of weights only those that were chosen."""
        chosen = [count for count in self.counts() if count > 0]
        if self.cast == "fp8":
            return sum(Gemm(m, self.n, self.k).num_bytes for m in chosen)
        return 2 * (len(chosen) * self.n * self.k + self.rows * (self.n + self.k))


LITE_EXPERT_WEIGHTS = ((2816, 2048), (2048, 1408))
"""gate_up and down of DeepSeek-V2-Lite; [n, k]."""
LITE_EXPERTS = tuple(ChosenExperts(tokens, 6, 64, n, k) for tokens in (1, 16, 64) for n, k in LITE_EXPERT_WEIGHTS)
"""A decode step of DeepSeek-V2-Lite as it is released, at the batches of docs/decode_step.md."""
LITE_EXPERTS_STAND_INS = (ChosenExperts(2, 3, 5, 136, 72),)

FP8_EXPERTS = (
    *(replace(shape, cast="fp8", taste=0.5) for shape in LITE_EXPERTS),
    *(ChosenExperts(tokens, 1, 32, n, k, cast="fp8", taste=0.5) for tokens in (64, 512) for n, k in EXPERT_WEIGHTS),
)
"""The same with quantized weights, and what of 64 or 512 tokens comes to one of eight ranks of DeepSeek-V3; popular
experts get several times as many as the others."""
FP8_EXPERTS_STAND_INS = (ChosenExperts(2, 3, 5, 136, 272, cast="fp8", taste=0.5),)


# ----------------------------------------------------------------------------------------------------------- MLA

CACHED_TOKEN = {"bf16": 1152, "fp8": 656, "e4m3": 576}
"""Bytes of a token in each format of the latent cache."""


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
        cached = self.s_k * CACHED_TOKEN[self.cache]
        return self.batch * (cached + self.s_q * self.heads * 2 * (576 + 512))


MLA_GRID = tuple(
    Mla(batch, 1, s_k, heads) for heads in (16, 64, 128) for batch in (1, 16, 64) for s_k in (1024, 8192, 65536)
)
"""Heads of a rank under tensor parallelism 8, 2 and 1; few, some and many requests; short to long contexts."""
MLA_LARGE = (Mla(128, 1, 4096, 128), Mla(128, 1, 16384, 128), Mla(128, 2, 4096, 128), Mla(128, 2, 16384, 128))
"""The grid of FlashMLA's own benchmark: 128 requests, with and without a draft token."""
MLA_DRAFTS = (Mla(32, 1, 4096, 8), Mla(32, 4, 4096, 16), Mla(32, 4, 4096, 32))
"""Draft tokens and small ranks."""
MLA = MLA_GRID + MLA_LARGE + MLA_DRAFTS
MLA_BETWEEN = tuple(
    x
    for x in (Mla(b, 1, s_k, h) for h in (8, 16, 128) for b in (1, 2, 4, 8, 32) for s_k in (512, 2048, 4096, 32768))
    if x not in MLA
)
"""Between the points of the grid: few requests, which leave SMs idle, and contexts where the split of k changes."""
MLA_FP8 = tuple(replace(x, cache="fp8") for x in (*MLA, *MLA_BETWEEN) if x.s_k >= 4096)
MLA_ONE_SCALE = tuple(replace(x, cache="e4m3") for x in MLA_GRID if x.heads != 64 and x.s_k >= 8192)
MLA_STAND_INS = (Mla(2, 1, 70, 4), Mla(2, 2, 130, 16), Mla(1, 1, 64, 8, "fp8"), Mla(2, 1, 70, 8, "e4m3"))


@dataclass(frozen=True)
class Prefill:
    """Expanded MLA: `batch` sequences, each of the last `s_q` queries over `s_k` keys of 192 and values of 128."""

    batch: int
    s_q: int
    s_k: int
    heads: int
    causal: bool = True

    def __str__(self) -> str:
        return f"{self.batch} x {self.s_q} x {self.s_k}, {self.heads} heads{'' if self.causal else ', not causal'}"

    @property
    def flops(self) -> float:
        """Of the visible pairs only: a causal mask hides no key from the last query, and one more from each before."""
        pairs = self.s_q * self.s_k - (self.s_q * (self.s_q - 1) // 2 if self.causal else 0)
        return 2 * self.batch * self.heads * pairs * (192 + 128)

    @property
    def num_bytes(self) -> float:
        """Queries, keys and values read once; output and log-sum-exp written once."""
        query, key = 2 * (192 + 128) + 4, 2 * (192 + 128)
        return self.batch * self.heads * (self.s_q * query + self.s_k * key)


PREFILL = tuple(
    Prefill(batch, s_q, s_k, heads, causal)
    for heads in (16, 128)
    for batch, s_q, s_k, causal in (
        (2, 4096, 4096, True),  # whole prompts, as FlashMLA's own benchmark has them
        (2, 8192, 8192, True),
        (1, 4096, 16384, True),  # the last part of a long prompt, over all of it
        (1, 4096, 16384, False),  # a part over what came before, to be merged with the part over itself
    )
)
"""Heads of a rank under tensor parallelism 8 and 1."""
PREFILL_STAND_INS = (Prefill(2, 70, 70, 4), Prefill(1, 20, 150, 4), Prefill(2, 20, 50, 4, causal=False))


@dataclass(frozen=True)
class Heads:
    """`t` tokens of `heads` heads."""

    t: int
    heads: int

    def __str__(self) -> str:
        return f"{self.t} x {self.heads} heads"


TOKENS = (1, 64, 128, 4096)
"""Tokens of a step."""
MERGE = tuple(Heads(t, 128) for t in TOKENS)
"""The two halves of chunked prefill, values of 128 channels."""
ROPE = tuple(Heads(t, heads) for heads in (1, 128) for t in TOKENS)
"""The 64 rotated channels of the key that all heads share, and of the queries."""
HEADS_STAND_INS = (Heads(1, 1), Heads(7, 4))


@dataclass(frozen=True)
class Cached:
    """`batch` sequences of `s_k` tokens each in the latent cache."""

    batch: int
    s_k: int
    cache: str = "bf16"

    def __str__(self) -> str:
        return f"{self.batch} x {self.s_k}, {self.cache}"


CACHE_WRITE = tuple(Cached(t, 1, cache) for cache in CACHED_TOKEN for t in TOKENS)
"""What a step adds."""
CACHE_GATHER = tuple(
    Cached(batch, s_k, cache) for cache in CACHED_TOKEN for batch, s_k in ((1, 4096), (1, 65536), (16, 8192))
)
"""Contexts of prompts that are read in parts: 4096 to 131072 tokens at a time."""
CACHE_WRITE_STAND_INS = tuple(Cached(t, 1, cache) for cache in CACHED_TOKEN for t in (1, 7))
CACHE_GATHER_STAND_INS = tuple(Cached(2, 70, cache) for cache in CACHED_TOKEN)


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
WEIGHTS = tuple(Rows(n, k) for n, k in V3_WEIGHTS)
SCALES = (Rows(128, HIDDEN), *(Rows(m, k) for m in (4096, 4097, 8192) for k in (128, HIDDEN)))
"""Tokens and channels whose scales change their layout; the odd ones end in padding."""
NORM = (Rows(1, HIDDEN), Rows(64, HIDDEN), Rows(128, HIDDEN), Rows(4096, HIDDEN), Rows(4096, 1536), Rows(4096, 512))
ACTIVATION = (Rows(8, 2048), Rows(512, 2048), Rows(1024, 18432), Rows(32768, 2048))
"""Rows after gate_up: routed experts (2048 channels each half), and the dense layers' 18432."""
ROWS_STAND_INS = (Rows(1, 128), Rows(5, 384))
TOKENS_STAND_INS = (1, 7)
