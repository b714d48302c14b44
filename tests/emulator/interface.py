"""The C interface of csrc/launch/deepseek_kernels.h by ctypes, on tensors of the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
MASKED, OFFSETS, CONTIGUOUS = 1, 2, 3


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Gemm(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "a sfa b sfb d"),
        *fields(ctypes.c_int64, "m n k a_stride b_stride d_stride"),
        *fields(ctypes.c_int64, "sfa_stride_m sfa_stride_k sfb_stride_n sfb_stride_k"),
        *fields(ctypes.c_int, "d_dtype accumulate batch_invariant b_is_constant"),
        *fields(ctypes.c_void_p, "workspace"),
    ]


class GroupedGemm(ctypes.Structure):
    _fields_ = [
        ("gemm", Gemm),
        *fields(ctypes.c_int64, "a_stride_group sfa_stride_group d_stride_group b_stride_group sfb_stride_group"),
        *fields(ctypes.c_int64, "num_groups"),
        *fields(ctypes.c_int, "row_layout"),
        *fields(ctypes.c_void_p, "layout"),
        *fields(ctypes.c_int64, "expected_m"),
        *fields(ctypes.c_int, "clear_unowned"),
    ]


class GroupedBf16Gemm(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "a b d offsets"),
        *fields(ctypes.c_int64, "num_groups m n k a_stride b_stride d_stride b_stride_group"),
        *fields(ctypes.c_int, "clear_unowned"),
    ]


class KGroupedGemm(ctypes.Structure):
    _fields_ = [
        ("gemm", Gemm),
        *fields(ctypes.c_int64, "d_stride_group num_groups"),
        *fields(ctypes.c_void_p, "k_offsets"),
    ]


class PerTokenCast(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "x q sf"),
        *fields(ctypes.c_int64, "num_groups m k x_stride_group x_stride_m sf_stride_group sf_stride_m sf_stride_k"),
        *fields(ctypes.c_int, "x_dtype"),
        *fields(ctypes.c_float, "amax_floor"),
        *fields(ctypes.c_int, "use_ue8m0"),
    ]


class PerBlockCast(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "x q sf"),
        *fields(ctypes.c_int64, "num_groups n k x_stride_group x_stride_n"),
        *fields(ctypes.c_int, "x_dtype"),
        *fields(ctypes.c_float, "amax_floor"),
        *fields(ctypes.c_int, "use_ue8m0"),
    ]


class SwiGlu(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "x y q sf"),
        *fields(ctypes.c_int64, "num_groups m d x_stride_group x_stride_m sf_stride_group sf_stride_m sf_stride_k"),
        *fields(ctypes.c_int, "x_dtype"),
        *fields(ctypes.c_float, "amax_floor"),
        *fields(ctypes.c_int, "use_ue8m0"),
    ]


class Norm(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "x residual weight residual_out y q sf"),
        *fields(ctypes.c_int64, "num_groups m d x_stride_group x_stride_m residual_stride_group residual_stride_m"),
        *fields(ctypes.c_int64, "sf_stride_group sf_stride_m sf_stride_k"),
        *fields(ctypes.c_int, "x_dtype weight_dtype"),
        *fields(ctypes.c_float, "eps amax_floor"),
        *fields(ctypes.c_int, "use_ue8m0"),
    ]


class Rotation(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "x y positions cos_sin"),
        *fields(ctypes.c_int64, "t num_heads d max_position x_stride_t x_stride_head cos_sin_stride"),
        *fields(ctypes.c_int, "dtype positions_are_64_bit interleaved"),
    ]


class LatentWrite(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "kv_c k_pe positions cos_sin slots kv_cache norm_weight"),
        *fields(ctypes.c_int64, "num_tokens kv_lora_rank rope_dim max_position num_pages page_size"),
        *fields(ctypes.c_int64, "kv_c_stride k_pe_stride page_stride row_stride"),
        *fields(ctypes.c_int, "dtype weight_dtype format positions_are_64_bit slots_are_64_bit interleaved"),
        *fields(ctypes.c_float, "eps amax_floor kv_scale"),
    ]


class LatentGather(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "kv_cache block_table cu_seqlens out"),
        *fields(ctypes.c_int64, "b total d num_pages page_size max_pages page_stride row_stride table_stride"),
        *fields(ctypes.c_int, "dtype out_dtype format"),
        *fields(ctypes.c_float, "kv_scale"),
    ]


class AttnStates(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "out_a out_b lse_a lse_b out lse"),
        *fields(ctypes.c_int64, "num_groups m d a_stride_group a_stride_m b_stride_group b_stride_m"),
        *fields(ctypes.c_int, "dtype"),
    ]


class Gate(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "logits bias topk_weights topk_idx"),
        *fields(ctypes.c_int64, "t num_experts num_groups num_topk num_topk_groups logits_stride"),
        *fields(ctypes.c_int, "is_softmax normalizes"),
        *fields(ctypes.c_float, "scale"),
    ]


class ExpertRows(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "topk_idx token_idx row_idx offsets m_indices"),
        *fields(ctypes.c_int64, "t num_topk num_experts alignment num_rows"),
    ]


class RowGather(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "x token_idx out"),
        *fields(ctypes.c_int64, "t d num_rows x_stride_t x_stride_d element_bytes"),
    ]


class RowSum(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "y row_idx topk_weights out"),
        *fields(ctypes.c_int64, "num_rows t d num_topk y_stride"),
        *fields(ctypes.c_int, "dtype"),
    ]


class MlaDecode(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "q kv_cache block_table cache_seqlens cu_seqlens_q out lse workspace"),
        *fields(ctypes.c_int64, "b s_q num_heads num_pages page_size max_pages q_stride_b q_stride_s q_stride_h"),
        *fields(ctypes.c_int64, "page_stride key_stride table_stride out_stride_b out_stride_s out_stride_h"),
        *fields(ctypes.c_int, "dtype"),
        *fields(ctypes.c_double, "softmax_scale"),
        *fields(ctypes.c_int, "causal format"),
        *fields(ctypes.c_float, "kv_scale"),
        *fields(ctypes.c_int, "batch_invariant"),
    ]


class MlaDecodePlan(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_int, "cluster_size num_parts tiles_per_part tile_rows"),
        *fields(ctypes.c_int64, "workspace_bytes"),
    ]


class Prefill(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "q k v cu_seqlens_q cu_seqlens_k out lse workspace"),
        *fields(ctypes.c_int64, "b total_q total_k num_heads"),
        *fields(ctypes.c_int64, "q_stride_t q_stride_h k_stride_t k_stride_h v_stride_t v_stride_h"),
        *fields(ctypes.c_int, "dtype"),
        *fields(ctypes.c_double, "softmax_scale"),
        *fields(ctypes.c_int, "causal"),
    ]


def format_of(kv_cache: Tensor) -> int:
    """DSO_LATENT_FP8_BLOCKS, DSO_LATENT_FP8 or DSO_LATENT_PLAIN."""
    return {torch.uint8: 1, torch.float8_e4m3fn: 2}.get(kv_cache.dtype, 0)


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()


class Kernels:
    """The kernels on an emulated GPU of `num_sms` SMs, whose threads take turns in an order that `seed` decides."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self._library.dso_last_error.restype = ctypes.c_char_p
        self._library.dso_fp8_gemm_sharing_bytes.restype = ctypes.c_int64
        self._library.emulator_set.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self.use()

    def use(self, num_sms: int = 4, seed: int = 0) -> None:
        self.num_sms = num_sms
        self._library.emulator_set(num_sms, seed)

    def _call(self, name: str, call: ctypes.Structure, *more: int | ctypes.Structure, has_stream: bool = True) -> None:
        arguments = [ctypes.byref(x) if isinstance(x, ctypes.Structure) else x for x in (call, *more)]
        status = getattr(self._library, name)(*arguments, *([None] if has_stream else []))
        assert status == 0, self._library.dso_last_error().decode()

    def fp8_gemm_nt(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor],
        d: Tensor,
        *,
        plan: tuple[int, ...] | None = None,
        accumulate: bool = False,
    ) -> None:
        """`plan` is a config, a number of splits and, unless none, of shared tiles; None: the package's own choice."""
        call = gemm_of(operands, d, accumulate)
        workspace = torch.randint(-128, 128, (self._library.dso_fp8_gemm_sharing_bytes(self.num_sms),)).to(torch.int8)
        call.workspace = workspace.data_ptr()
        if plan is None:
            self._call("dso_fp8_gemm_nt", call)
        else:
            self._call("dso_fp8_gemm_nt_by_plan", call, *(*plan, 0)[:3])

    def m_grouped_fp8_gemm_nt(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor],
        d: Tensor,
        row_layout: int,
        layout: Tensor,
        *,
        expected_m: int = 1,
        config: int | None = None,
        counts_tiles: bool = True,
        accumulate: bool = False,
        clear_unowned: bool = False,
        b_is_constant: bool = False,
    ) -> int:
        """`config` is a line of fp8_gemm_configs.def; None: the package's own choice. Returns the workspace, garbage
        before: 0 if it counted tiles."""
        call = grouped_gemm_of(operands, d, row_layout, layout, expected_m, accumulate, clear_unowned)
        call.gemm.b_is_constant = b_is_constant
        workspace = torch.randint(1, 2**62, (1,))
        call.gemm.workspace = workspace.data_ptr() if counts_tiles else None
        if config is None:
            self._call("dso_m_grouped_fp8_gemm_nt", call)
        else:
            self._call("dso_m_grouped_fp8_gemm_nt_by_plan", call, config)
        return int(workspace)

    def m_grouped_bf16_gemm_nt(
        self,
        a: Tensor,
        b: Tensor,
        offsets: Tensor,
        d: Tensor,
        *,
        config: int | None = None,
        clear_unowned: bool = False,
    ) -> None:
        """`config` is a line of bf16_gemm_configs.def; None: the package's own choice."""
        call = grouped_bf16_gemm_of(a, b, offsets, d, clear_unowned)
        if config is None:
            self._call("dso_m_grouped_bf16_gemm_nt", call)
        else:
            self._call("dso_m_grouped_bf16_gemm_nt_by_plan", call, config)

    def k_grouped_fp8_gemm_nt(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor],
        d: Tensor,
        k_offsets: Tensor,
        *,
        accumulate: bool = False,
    ) -> None:
        gemm = gemm_of(operands, d[0], accumulate)
        self._call("dso_k_grouped_fp8_gemm_nt", KGroupedGemm(gemm, d.stride(0), d.shape[0], k_offsets.data_ptr()))

    def per_token_cast(self, x: Tensor, q: Tensor, sf: Tensor, *, use_ue8m0: bool = False) -> None:
        extents = (*x.shape, *x.stride()[:2], *sf.stride())
        call = PerTokenCast(pointer(x), pointer(q), pointer(sf), *extents, DTYPES[x.dtype], 1e-4, use_ue8m0)
        self._call("dso_per_token_cast_to_fp8", call)

    def per_block_cast(self, x: Tensor, q: Tensor, sf: Tensor, *, use_ue8m0: bool = False) -> None:
        extents = (*x.shape, *x.stride()[:2])
        call = PerBlockCast(pointer(x), pointer(q), pointer(sf), *extents, DTYPES[x.dtype], 1e-4, use_ue8m0)
        self._call("dso_per_block_cast_to_fp8", call)

    def silu_mul(self, x: Tensor, y: Tensor | None, q: Tensor | None = None, sf: Tensor | None = None) -> None:
        groups, m, two_d = x.shape
        extents = (groups, m, two_d // 2, *x.stride()[:2], *strides(sf, 3))
        call = SwiGlu(pointer(x), pointer(y), pointer(q), pointer(sf), *extents, DTYPES[x.dtype], 1e-4, 0)
        self._call("dso_silu_mul", call)

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        y: Tensor | None,
        *,
        residual: Tensor | None = None,
        residual_out: Tensor | None = None,
        q: Tensor | None = None,
        sf: Tensor | None = None,
        eps: float = 1e-6,
    ) -> None:
        pointers = [pointer(t) for t in (x, residual, weight, residual_out, y, q, sf)]
        extents = (*x.shape, *x.stride()[:2], *strides(residual, 3)[:2], *strides(sf, 3))
        self._call("dso_rms_norm", Norm(*pointers, *extents, DTYPES[x.dtype], DTYPES[weight.dtype], eps, 1e-4, 0))

    def rope(self, x: Tensor, positions: Tensor, cos_sin: Tensor, y: Tensor, *, interleaved: bool = True) -> None:
        extents = (*x.shape, cos_sin.shape[0], *x.stride()[:2], cos_sin.stride(0))
        options = (DTYPES[x.dtype], positions.dtype == torch.int64, interleaved)
        self._call("dso_rope", Rotation(*map(pointer, (x, y, positions, cos_sin)), *extents, *options))

    def mla_cache_write(
        self,
        kv_c: Tensor,
        k_pe: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        slots: Tensor,
        kv_cache: Tensor,
        *,
        norm_weight: Tensor | None = None,
        eps: float = 1e-6,
        interleaved: bool = True,
        kv_scale: float = 1.0,
    ) -> None:
        operands = (kv_c, k_pe, positions, cos_sin, slots, kv_cache, norm_weight)
        extents = (*kv_c.shape, k_pe.shape[1], cos_sin.shape[0], *kv_cache.shape[:2])
        rows = (kv_c.stride(0), k_pe.stride(0), *kv_cache.stride()[:2])
        dtypes = (DTYPES[kv_c.dtype], DTYPES[kv_c.dtype if norm_weight is None else norm_weight.dtype])
        wide = (x.dtype == torch.int64 for x in (positions, slots))
        options = (*dtypes, format_of(kv_cache), *wide, interleaved, eps, 1e-4, kv_scale)
        self._call("dso_mla_cache_write", LatentWrite(*map(pointer, operands), *extents, *rows, *options))

    def mla_cache_gather(
        self, kv_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, out: Tensor, kv_scale: float = 1.0
    ) -> None:
        form = format_of(kv_cache)
        extents = (block_table.shape[0], *out.shape, *kv_cache.shape[:2], block_table.shape[1])
        rows = (*kv_cache.stride()[:2], block_table.stride(0))
        dtypes = (DTYPES[torch.bfloat16 if form else kv_cache.dtype], DTYPES[out.dtype])
        pointers = map(pointer, (kv_cache, block_table, cu_seqlens, out))
        self._call("dso_mla_cache_gather", LatentGather(*pointers, *extents, *rows, *dtypes, form, kv_scale))

    def merge_attn_states(
        self, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        pointers = map(pointer, (out_a, out_b, lse_a, lse_b, out, lse))
        extents = (*out_a.shape, *out_a.stride()[:2], *out_b.stride()[:2])
        self._call("dso_merge_attn_states", AttnStates(*pointers, *extents, DTYPES[out_a.dtype]))

    def moe_gate(
        self,
        logits: Tensor,
        bias: Tensor | None,
        topk_weights: Tensor,
        topk_idx: Tensor,
        *,
        num_groups: int,
        num_topk_groups: int,
        scoring_func: str,
        norm_topk_prob: bool,
        routed_scaling_factor: float,
    ) -> None:
        extents = (*logits.shape, num_groups, topk_idx.shape[1], num_topk_groups, logits.stride(0))
        options = (scoring_func == "softmax", norm_topk_prob, routed_scaling_factor)
        pointers = map(pointer, (logits, bias, topk_weights, topk_idx))
        self._call("dso_moe_gate", Gate(*pointers, *extents, *options))

    def moe_mapping(
        self,
        topk_idx: Tensor,
        token_idx: Tensor,
        row_idx: Tensor,
        offsets: Tensor,
        m_indices: Tensor,
        *,
        alignment: int,
    ) -> None:
        extents = (*topk_idx.shape, offsets.shape[0] - 1, alignment, token_idx.shape[0])
        pointers = map(pointer, (topk_idx, token_idx, row_idx, offsets, m_indices))
        self._call("dso_moe_mapping", ExpertRows(*pointers, *extents))

    def moe_permute(self, x: Tensor, token_idx: Tensor, out: Tensor) -> None:
        extents = (*x.shape, token_idx.shape[0], *x.stride(), x.element_size())
        self._call("dso_moe_permute", RowGather(*map(pointer, (x, token_idx, out)), *extents))

    def moe_unpermute(self, y: Tensor, row_idx: Tensor, topk_weights: Tensor, out: Tensor) -> None:
        extents = (y.shape[0], *out.shape, row_idx.shape[1], y.stride(0), DTYPES[y.dtype])
        self._call("dso_moe_unpermute", RowSum(*map(pointer, (y, row_idx, topk_weights, out)), *extents))

    def mla_decode(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        softmax_scale: float,
        *,
        causal: bool = True,
        cu_seqlens_q: Tensor | None = None,
        batch_invariant: bool = False,
        kv_scale: float = 1.0,
        plan: tuple[int, int] | tuple[int, int, int] | None = None,
        tile_rows: int | None = None,
    ) -> None:
        """`plan` is the CTAs of a cluster and the number of clusters that share keys, and with how many tiles each that
        number grows; `tile_rows` the rows of a tile, 64 or 16. None: the package's own."""
        call = mla_decode_of(operands, out, lse, softmax_scale, causal, cu_seqlens_q, batch_invariant, kv_scale)
        b, s_q, h = call.b, call.s_q, call.num_heads
        chosen = MlaDecodePlan()
        self._call("dso_plan_mla_decode", call, chosen, has_stream=False)
        if plan is not None or tile_rows is not None:
            # As many bytes as any plan takes, and poison where it has not written.
            rows = tile_rows or chosen.tile_rows
            units = b * -(-s_q * h // rows) if cu_seqlens_q is None else -(-s_q * h // rows) + b + 1
            size, parts, *growth = plan or (chosen.cluster_size, chosen.num_parts, chosen.tiles_per_part)
            num_bytes = mla_workspace_bytes(units, size, parts, rows)
            chosen = MlaDecodePlan(size, parts, *(growth or [0]), rows, num_bytes)
        workspace = torch.full((chosen.workspace_bytes,), 0xFF, dtype=torch.uint8)
        call.workspace = workspace.data_ptr()
        self._call("dso_mla_decode_by_plan", call, chosen)

    def mla_prefill(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        softmax_scale: float,
        *,
        causal: bool = True,
    ) -> None:
        q, k, v, cu_seqlens_q, _ = operands
        workspace = torch.full((4,), 0xFF, dtype=torch.uint8)
        pointers = [pointer(x) for x in (*operands, out, lse, workspace)]
        extents = (cu_seqlens_q.shape[0] - 1, q.shape[0], k.shape[0], q.shape[1])
        rows = [stride for x in (q, k, v) for stride in x.stride()[:2]]
        self._call("dso_mla_prefill", Prefill(*pointers, *extents, *rows, DTYPES[q.dtype], softmax_scale, causal))


def grouped_gemm_of(
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    d: Tensor,
    row_layout: int,
    layout: Tensor,
    expected_m: int,
    accumulate: bool,
    clear_unowned: bool,
) -> GroupedGemm:
    """Without a workspace."""
    one = tuple(x[0] if x.dim() == 3 else x for x in operands)
    gemm = gemm_of(one, d[0] if d.dim() == 3 else d, accumulate)
    a, sfa, b, sfb = operands
    of_group = [x.stride(0) if x.dim() == 3 else 0 for x in (a, sfa, d, b, sfb)]
    return GroupedGemm(gemm, *of_group, b.shape[0], row_layout, layout.data_ptr(), expected_m, clear_unowned)


def grouped_bf16_gemm_of(a: Tensor, b: Tensor, offsets: Tensor, d: Tensor, clear_unowned: bool) -> GroupedBf16Gemm:
    extents = (b.shape[0], *d.shape, a.shape[1], a.stride(0), b.stride(1), d.stride(0), b.stride(0))
    return GroupedBf16Gemm(*map(pointer, (a, b, d, offsets)), *extents, clear_unowned)


def mla_workspace_bytes(units: int, size: int, parts: int, rows: int) -> int:
    """No fewer than a plan takes for so many tiles of rows, each of which `parts` clusters of `size` share."""
    return 4 * units * (2 * size + parts * rows * 512 + (parts + 7) * rows * size)


def mla_decode_of(
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool,
    cu_seqlens_q: Tensor | None,
    batch_invariant: bool,
    kv_scale: float,
) -> MlaDecode:
    """Without a workspace."""
    q, kv_cache, block_table, _ = operands
    (s_q, h, _), (num_pages, page_size, _) = q.shape[-3:], kv_cache.shape
    b, max_pages = block_table.shape
    pointers = [pointer(x) for x in (*operands, cu_seqlens_q, out, lse, None)]
    extents = (b, s_q, h, num_pages, page_size, max_pages)
    in_q, in_out = ((x.stride(0) if x.dim() == 4 else 0, *x.stride()[-3:-1]) for x in (q, out))
    rows = (*in_q, *kv_cache.stride()[:2], block_table.stride(0), *in_out)
    options = (DTYPES[q.dtype], softmax_scale, causal, format_of(kv_cache), kv_scale, batch_invariant)
    return MlaDecode(*pointers, *extents, *rows, *options)


def gemm_of(operands: Any, d: Tensor, accumulate: bool) -> Gemm:
    a, sfa, b, sfb = operands
    pointers = (pointer(x) for x in (a, sfa, b, sfb, d))
    extents = (a.shape[0], b.shape[0], a.shape[1])
    rows = (a.stride(0), b.stride(0), d.stride(0))
    return Gemm(*pointers, *extents, *rows, *sfa.stride(), *sfb.stride(), DTYPES[d.dtype], accumulate, 0, 0)
