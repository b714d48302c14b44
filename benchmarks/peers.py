"""Other implementations of the same ops, run live beside ours where they are found; none is needed.

torch's own cuBLASLt GEMMs are always tried. DeepGEMM, FlashMLA and FlashAttention 3 are looked for in the folder given
by `pytest benchmarks --peers DIR`: a `deep_gemm` package, `_flashmla_C.abi3.so`, `_vllm_fa3_C.abi3.so`, anywhere in it.

Each function here returns provider -> `prepare(inputs)`, which does what a caller would do once (layouts, outputs,
metadata) and returns the call to time. A `prepare` that raises makes its provider absent, with the reason in the
results.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_ops.bench import Call, tensorwise_gemm
from deepseek_ops.numeric import BLOCK, FP8, align, ceil_div

Prepare = Callable[..., Call]
"""From an input set (the op's arguments) to a call on it."""

folder: Path | None = None
"""Where to look, from --peers."""


class Absent(RuntimeError):
    """A peer that is not there."""


def _find(name: str) -> Path:
    if folder is None:
        raise Absent(f"no {name}: --peers DIR was not given")
    found = sorted(folder.rglob(name))
    if not found:
        raise Absent(f"no {name} in the folder of --peers")
    return found[0]


# ------------------------------------------------------------------------------------------------------- GEMM


def dense_gemm() -> dict[str, Prepare]:
    """Peers of `fp8_gemm_nt(a, sfa, b, sfb, out_dtype)`."""
    return {
        "deep_gemm": _deep_gemm_dense,
        "cublaslt_blockwise": _cublaslt_blockwise,
        "cublaslt_tensorwise": lambda a, sfa, b, sfb, *_: tensorwise_gemm(a, b),
    }


UNVERIFIED = {
    "cublaslt_tensorwise": "one scale for each operand: less work, an upper mark",
    "torch": "plain torch in float32, the formula itself",
    "copy": "a copy that reads and writes as many bytes in all: what memory gives at this size",
}
"""Providers that are shown beside the others, but neither verified nor counted as peers, and why."""

COMPILED_AT_FIRST_CALL = {"deep_gemm"}
"""Providers that call nvcc for seconds when they meet a shape for the first time, and keep what it made on disk."""


def _cublaslt_blockwise(a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, *_: Any) -> Call:
    from torch.nn.functional import ScalingType, scaled_mm

    (m, k), n = a.shape, b.shape[0]
    blocks = ceil_div(k, BLOCK)
    scale_a = torch.empty_strided((m, blocks), (1, m), device=a.device).copy_(sfa)
    padded = align(blocks, 4)
    scale_b = torch.zeros(ceil_div(n, BLOCK), padded, device=a.device)
    scale_b[:, :blocks] = sfb
    recipes = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    return lambda: scaled_mm(a, b.T, scale_a, recipes[0], scale_b.T, recipes[1], output_dtype=torch.bfloat16)


@cache
def _deep_gemm() -> Any:
    try:
        return importlib.import_module("deep_gemm")
    except ImportError:
        sys.path.insert(0, str(_find("deep_gemm").parent))
        return importlib.import_module("deep_gemm")


def _deep_gemm_dense(a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, *_: Any) -> Call:
    library = _deep_gemm()
    d = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device=a.device)
    sfa = library.get_mn_major_tma_aligned_tensor(sfa)

    def call() -> Tensor:
        library.fp8_gemm_nt((a, sfa), (b, sfb), d)
        return d

    return call


def contiguous_gemm() -> dict[str, Prepare]:
    """Peers of the grouped GEMM over rows sorted by group."""
    return {"deep_gemm": _deep_gemm_contiguous}


def _deep_gemm_contiguous(a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, m_indices: Tensor, *_: Any) -> Call:
    library = _deep_gemm()
    d = torch.empty(a.shape[0], b.shape[1], dtype=torch.bfloat16, device=a.device)
    sfa = library.get_mn_major_tma_aligned_tensor(sfa)

    def call() -> Tensor:
        library.m_grouped_fp8_gemm_nt_contiguous((a, sfa), (b, sfb), d, m_indices)
        return d

    return call


def offsets_bf16_gemm() -> dict[str, Prepare]:
    """Peers of `m_grouped_bf16_gemm_nt_offsets(a, b, offsets)`."""
    return {"grouped_mm": lambda a, b, offsets: lambda: torch.nn.functional.grouped_mm(a, b.mT, offs=offsets[1:])}


def masked_gemm(expected_m: int) -> dict[str, Prepare]:
    """Peers of the grouped GEMM over buffers of fixed size."""

    def prepare(a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, masked_m: Tensor, *_: Any) -> Call:
        library = _deep_gemm()
        d = torch.empty(*a.shape[:2], b.shape[1], dtype=torch.bfloat16, device=a.device)
        sfa = library.get_mn_major_tma_aligned_tensor(sfa)

        def call() -> Tensor:
            library.m_grouped_fp8_gemm_nt_masked((a, sfa), (b, sfb), d, masked_m, expected_m)
            return d

        return call

    return {"deep_gemm": prepare}


def k_grouped_gemm() -> dict[str, Prepare]:
    """Peers of `k_grouped_fp8_gemm_nt(a, sfa, b, sfb, k_offsets, out_dtype)`."""
    return {"deep_gemm": _deep_gemm_k_grouped}


def _deep_gemm_k_grouped(a: Tensor, sfa: Tensor, b: Tensor, sfb: Tensor, k_offsets: Tensor, *_: Any) -> Call:
    """DeepGEMM adds to an output that is there, so its calls copy zeros into `d` first, which they are charged for."""
    library = _deep_gemm()
    ends = k_offsets.tolist()
    counts = [end - start for start, end in pairwise(ends)]
    counts_on_device = torch.tensor(counts, dtype=torch.int32, device=a.device)
    operands = [
        (by_group(x, ends), library.get_mn_major_tma_aligned_tensor(scales)) for x, scales in ((a, sfa), (b, sfb))
    ]
    zeros = torch.zeros(len(counts), a.shape[0], b.shape[0], device=a.device)
    d = torch.empty_like(zeros)

    def call() -> Tensor:
        library.k_grouped_fp8_gemm_nt_contiguous(*operands, d, counts, counts_on_device, zeros)
        return d

    return call


def by_group(x: Tensor, ends: Sequence[int]) -> Tensor:
    """The columns of each group by themselves, row by row, one group after the other: flat."""
    groups = [x[:, start:end].reshape(-1).view(torch.uint8) for start, end in pairwise(ends)]
    return torch.cat(groups).view(FP8)


# -------------------------------------------------------------------------------------------------------- MLA


def mla_decode(softmax_scale: float) -> dict[str, Prepare]:
    """Peers of MLA decoding from a bfloat16 cache. Inputs: `q` `[b, s_q, h, 576]`, `kv` `[pages, 64, 576]`,
    `block_table` `[b, pages]` and `seqlens` `[b]`, both int32. Calls return `[b, s_q, h, 512]`."""

    def flash_mla(q: Tensor, kv: Tensor, block_table: Tensor, seqlens: Tensor) -> Call:
        forward = _load_op("_flashmla_C.abi3.so", "_flashmla_C", "dense_decode_fwd")
        fixed = (q, kv.unsqueeze(2), 512, seqlens, block_table, softmax_scale, q.shape[1] > 1)
        metadata, splits = forward(*fixed, None, None, None)[2:4]  # made once a step, as engines do
        return lambda: forward(*fixed, metadata, splits, None)[0]

    def fa3(q: Tensor, kv: Tensor, block_table: Tensor, seqlens: Tensor) -> Call:
        forward = _load_op("_vllm_fa3_C.abi3.so", "_vllm_fa3_C", "fwd")
        schedule = _load_op("_vllm_fa3_C.abi3.so", "_vllm_fa3_C", "get_scheduler_metadata")
        (b, s_q, heads, _), page_size = q.shape, kv.shape[1]
        latent, rope = kv.unsqueeze(2).split((512, 64), dim=-1)
        step = {
            "cu_seqlens_q": torch.arange(0, (b + 1) * s_q, s_q, dtype=torch.int32, device=q.device),
            "seqused_k": seqlens,
            "max_seqlen_q": s_q,
            "max_seqlen_k": block_table.shape[1] * page_size,
            "is_causal": True,
            "window_size_left": -1,
            "window_size_right": -1,
        }
        heads_and_dims = {"num_heads": heads, "num_heads_k": 1, "headdim": 64, "headdim_v": 512}
        metadata = schedule(  # made once a step, as engines do
            *by_name(
                schedule.default._schema,
                **step,
                **heads_and_dims,
                batch_size=b,
                qkv_dtype=q.dtype,
                page_size=page_size,
            )
        )
        arguments = by_name(
            forward.default._schema,
            **step,
            q=q[..., 512:].reshape(b * s_q, heads, 64),
            k=rope,
            v=latent,
            q_v=q[..., :512].reshape(b * s_q, heads, 512),
            page_table=block_table,
            softmax_scale=softmax_scale,
            scheduler_metadata=metadata,
            cp_world_size=1,  # 0, the neutral value of the others, would be no process at all
        )
        return lambda: forward(*arguments)[0].view(b, s_q, heads, 512)

    return {"fa3": fa3, "flash_mla": flash_mla}


@cache
def _load_op(library: str, namespace: str, name: str) -> Any:
    torch.ops.load_library(_find(library))
    return getattr(getattr(torch.ops, namespace), name)


def by_name(schema: torch.FunctionSchema, **given: Any) -> list[Any]:
    """Arguments by position from some by name: the rest take their default, None where allowed, else zero."""
    unknown = given.keys() - {argument.name for argument in schema.arguments}
    if unknown:
        raise Absent(f"{schema.name} has no argument {', '.join(sorted(unknown))}")
    zeros = {"int": 0, "float": 0.0, "bool": False}
    return [
        given[x.name]
        if x.name in given
        else x.default_value
        if x.has_default_value() or isinstance(x.type, torch.OptionalType)
        else zeros[str(x.type)]
        for x in schema.arguments
    ]
