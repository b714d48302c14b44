"""Which tile the FP8 GEMM takes for which shape: pinned, so that a change of the cost model shows what it changes."""

import json
from pathlib import Path

import pytest

from deepseek_ops import _native

MEASURED = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "h200-fp8-gemm-plans.json").read_text())

# Projections of DeepSeek-V3 (n, k): fused q_a and kv_a, q_b, kv_b, o, expert gate or up, expert down.
SHAPES = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]

# Rows and columns of a tile, and groups that take its steps in turn; the swapped tiles with a number of splits.
CHOICES = {
    1: [(8, 64, 2, 4), (16, 128, 1, 1), (8, 64, 1, 1), (8, 64, 1, 2), (8, 64, 2, 2), (8, 64, 2, 1)],
    16: [(16, 128, 1, 4), (16, 128, 1, 1), (16, 64, 1, 1), (16, 128, 1, 2), (64, 64, 2, 2), (64, 64, 2)],
    64: [(64, 64, 1, 4), (64, 64, 2), (64, 64, 1), (64, 64, 2), (64, 32, 2), (64, 64, 2)],
    128: [(64, 64, 2, 2), (128, 64, 1), (128, 128, 1), (128, 128, 1, 2), (64, 64, 2), (128, 64, 1)],
    4096: [(192, 128, 1)] * 6,
}


@pytest.mark.parametrize("m", CHOICES)
def test_choice_on_132_sms(m):
    plans = [_native.fp8_gemm_plan(m, n, k) for n, k in SHAPES]
    tiles = [(plan["block_m"], plan["block_n"], plan["num_k_groups"]) for plan in plans]
    splits = [(plan["num_splits"],) if plan["most_splits"] > 1 else () for plan in plans]
    assert [tile + split for tile, split in zip(tiles, splits, strict=True)] == CHOICES[m]


def test_what_is_chosen_was_measured_to_be_nearly_the_fastest():
    compiled = [{key: tile[key] for key in MEASURED["configs"][0]} for tile in _native.fp8_gemm_configs()]
    measured = MEASURED["configs"]
    assert compiled[: len(measured)] == measured, "other tiles than those that were measured"
    longer = {}
    for shape, times in {**MEASURED["us"], **MEASURED["us_later"]}.items():
        plan = _native.fp8_gemm_plan(*map(int, shape.split(" x ")))
        shared = plan["num_shared_tiles"]
        numbers = (plan["config"], plan["num_splits"], shared) if shared else (plan["config"], plan["num_splits"])
        ours = {name: t for name, t in times.items() if name != "deep_gemm"}
        longer[shape] = ours["/".join(map(str, numbers))] / min(ours.values()) - 1
    assert max(longer.values()) < 0.07, max(longer, key=longer.__getitem__)
    assert sum(longer.values()) / len(longer) < 0.004


@pytest.mark.parametrize("num_sms", [1, 78, 114, 132])
def test_what_is_chosen_was_compiled(num_sms):
    compiled = _native.fp8_gemm_configs()
    for m in (1, 65, 1000, 100_000):
        for n, k in SHAPES:
            plan = _native.fp8_gemm_plan(m, n, k, num_sms=num_sms)
            assert {**plan, "num_splits": 1, "num_shared_tiles": 0} == compiled[plan["config"]]


def test_batch_invariant_plans_do_not_split_k():
    for m in (1, 16, 17, 64, 128, 4096):
        for n, k in SHAPES:
            plan = _native.fp8_gemm_plan(m, n, k, batch_invariant=True)
            assert (plan["num_splits"], plan["num_k_groups"], plan["num_shared_tiles"]) == (1, 1, 0)


# m, n, k and how many tiles are shared: where a last wave is far from full, and a tile long enough.
SHARED = [
    (4096, 2048, 7168, 80),
    (4096, 4096, 7168, 28),
    (4096, 7168, 16384, 16),
    (4096, 7168, 2048, 0),
    (4096, 512, 32768, 88),
    (8192, 7168, 16384, 32),
    (512, 7168, 16384, 36),
    (4096, 2112, 7168, 0),
    (4096, 24576, 1536, 0),
    (4096, 32768, 512, 0),
    (8192, 8192, 8192, 0),
]


@pytest.mark.parametrize(("m", "n", "k", "num_shared"), SHARED)
def test_tiles_that_make_no_full_wave_are_shared_where_that_pays(m, n, k, num_shared):
    plan = _native.fp8_gemm_plan(m, n, k)
    assert (plan["block_m"], plan["block_n"], plan["num_shared_tiles"]) == (192, 128, num_shared)


def test_a_shape_without_extent_has_no_plan():
    with pytest.raises(ValueError, match="at least 1"):
        _native.fp8_gemm_plan(0, 64, 128)
