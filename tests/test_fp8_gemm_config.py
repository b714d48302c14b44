"""Which tile the FP8 GEMM takes for which shape: pinned, so that a change of the cost model shows what it changes."""

import pytest

from deepseek_ops import _native

# Projections of DeepSeek-V3 (n, k): fused q_a and kv_a, q_b, kv_b, o, expert gate or up, expert down.
SHAPES = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]

CHOICES = {
    1: [(64, 64), (64, 128), (64, 128), (64, 64), (64, 64), (64, 64)],
    64: [(64, 64), (64, 128), (64, 128), (64, 64), (64, 64), (64, 64)],
    128: [(64, 64), (128, 128), (128, 128), (64, 128), (64, 64), (64, 128)],
    512: [(192, 64), (128, 128), (192, 128), (128, 128), (128, 128), (128, 128)],
    4096: [(192, 128)] * 6,
}


@pytest.mark.parametrize("m", CHOICES)
def test_choice_on_132_sms(m):
    chosen = [_native.fp8_gemm_config(m, n, k) for n, k in SHAPES]
    assert [(config["block_m"], config["block_n"]) for config in chosen] == CHOICES[m]


@pytest.mark.parametrize("num_sms", [1, 78, 114, 132])
def test_what_is_chosen_was_compiled(num_sms):
    compiled = _native.fp8_gemm_configs()
    for m in (1, 65, 1000, 100_000):
        for n, k in SHAPES:
            assert _native.fp8_gemm_config(m, n, k, num_sms) in compiled


def test_a_shape_without_extent_has_no_tile():
    with pytest.raises(ValueError, match="at least 1"):
        _native.fp8_gemm_config(0, 64, 128)
