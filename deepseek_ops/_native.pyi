"""Build, planners, and kernels on NumPy and CuPy arrays (csrc/python/native.cpp)."""

from typing import Any, TypedDict

class Fp8GemmPlan(TypedDict):
    config: int
    block_m: int
    block_n: int
    num_k_groups: int
    num_stages: int
    swaps_operands: bool
    shared_bytes: int
    most_splits: int
    num_splits: int
    num_shared_tiles: int

def built_with_cuda() -> bool:
    """Whether the CUDA kernels were compiled in."""

def has_kernels_for(device: int) -> bool:
    """Whether CUDA device `device` exists and is one that the kernels were compiled for. Initialises CUDA."""

def fp8_gemm_plan(m: int, n: int, k: int, *, batch_invariant: bool = False, num_sms: int = 132) -> Fp8GemmPlan:
    """What computes a shape of the FP8 GEMM; needs no GPU."""

def fp8_gemm_configs() -> list[Fp8GemmPlan]:
    """Every compiled tile of the FP8 GEMM."""

def fp8_gemm_nt(a: Any, sfa: Any, b: Any, sfb: Any, out: Any, *, accumulate: bool = False, stream: int = 0) -> None:
    """`out = (a * sfa) @ (b * sfb).T`, or `out +=`; see deepseek_ops.arrays."""

def per_token_cast_to_fp8(
    x: Any, q: Any, sf: Any, *, use_ue8m0: bool = False, amax_floor: float = 1e-4, stream: int = 0
) -> None:
    """`q, sf` = `x` quantized 1 x 128; see deepseek_ops.arrays."""
