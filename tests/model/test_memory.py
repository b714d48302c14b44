"""Parameters, cache sizes and what fits: the figures of the reports, and sums that must come out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_ops.mla_cache import mla_cache_shape
from deepseek_ops.model.checkpoint import Checkpoint, expected_tensors
from deepseek_ops.model.config import RELEASED
from deepseek_ops.model.memory import (
    cache_bytes_per_token,
    cache_sizes,
    count_parameters,
    fit,
    weight_bytes_by_dtype,
    weight_bytes_by_layer,
    weight_bytes_by_part,
)
from deepseek_ops.model.tiny import FAMILIES, tiny_config, write_tiny


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("v2-lite", 15.706, 2.45), ("v2", 235.741, 20.9), ("v2.5", 235.741, 20.9), ("v3", 671.026, 36.6)],
)
def test_the_releases_have_their_parameters(name: str, total: float, active: float) -> None:
    count = count_parameters(RELEASED[name])
    assert round(count.total / 1e9, 3) == total
    assert round(count.active / 1e9, 2 if active < 10 else 1) == active
    assert sum(count.by_part.values()) == count.total


def test_v3_has_one_mtp_layer_of_11_6_billion_and_copies_of_1_85_billion() -> None:
    count = count_parameters(RELEASED["v3"])
    assert round(count.mtp / 1e9, 1) == 11.6
    copies = [spec.numel for spec in expected_tensors(RELEASED["v3"]).values() if spec.is_optional]
    assert round(sum(copies) / 1e9, 2) == 1.85
    assert round((count.total + count.mtp + sum(copies)) / 1e9, 1) == 684.5
    with_embedding = count.active + count.by_part["embedding"]
    assert round(with_embedding / 1e9, 2) == 37.55
    assert count_parameters(RELEASED["v2"]).mtp == 0


def test_a_tied_head_is_counted_once() -> None:
    tied, untied = (count_parameters(tiny_config("v2", tie_word_embeddings=tied)) for tied in (True, False))
    assert untied.total - tied.total == untied.by_part["head"] == tied.by_part["embedding"]
    assert tied.active == untied.active


@pytest.mark.parametrize(
    ("name", "elements", "bf16", "of_mha", "of_expanded", "of_gqa8"),
    [
        ("v2-lite", 15_552, 31_104, 14.06, 11.25, 28.1),
        ("v2", 34_560, 69_120, 1.76, 1.41, 28.1),
        ("v3", 35_136, 70_272, 1.76, 1.41, 28.1),
    ],
)
def test_the_cache_is_as_small_as_published(
    name: str, elements: int, bf16: int, of_mha: float, of_expanded: float, of_gqa8: float
) -> None:
    config = RELEASED[name]
    sizes = cache_sizes(config)
    assert config.latent_dim * config.num_hidden_layers == elements
    assert sizes.bf16 == cache_bytes_per_token(config) == bf16
    assert round(100 * sizes.bf16 / sizes.mha, 2) == of_mha
    assert round(100 * sizes.bf16 / sizes.expanded, 2) == of_expanded
    assert round(100 * sizes.bf16 / sizes.gqa8, 1) == of_gqa8
    assert round(100 * sizes.fp8 / sizes.bf16, 1) == 56.9


def test_a_context_of_128k_takes_what_the_arithmetic_says() -> None:
    tokens = 128 * 1024
    assert round(cache_sizes(RELEASED["v3"]).bf16 * tokens / 2**30, 1) == 8.6
    assert round(cache_sizes(RELEASED["v3"]).mha * tokens / 2**30) == 488
    assert round(cache_sizes(RELEASED["v2-lite"]).bf16 * tokens / 2**30, 1) == 3.8


@pytest.mark.parametrize(("cache", "dtype"), [("bf16", torch.bfloat16), ("fp8", torch.uint8)])
def test_a_row_is_as_long_as_the_cache_makes_it(cache: str, dtype: torch.dtype) -> None:
    *_, row = mla_cache_shape(1, 64, dtype=dtype)
    assert cache_bytes_per_token(RELEASED["v3"], cache, num_layers=1) == row * dtype.itemsize  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_by_part_and_by_dtype_sum_to_the_file(family: str, tmp_path: Path) -> None:
    write_tiny(tmp_path, family)
    checkpoint = Checkpoint(tmp_path)
    assert sum(weight_bytes_by_part(checkpoint).values()) == checkpoint.nbytes
    by_dtype = weight_bytes_by_dtype(checkpoint)
    assert sum(nbytes for _, nbytes in by_dtype.values()) == checkpoint.nbytes
    assert sum(count for count, _ in by_dtype.values()) == len(checkpoint.tensors)
    assert ("MTP" in weight_bytes_by_part(checkpoint)) == checkpoint.has_mtp


def test_bytes_by_layer_count_the_dequantized_kv_b_proj_and_no_mtp(tmp_path: Path) -> None:
    config = write_tiny(tmp_path, "v3")
    checkpoint = Checkpoint(tmp_path)
    outside, layers = weight_bytes_by_layer(config, checkpoint)
    mtp = weight_bytes_by_part(checkpoint)["MTP"]
    kv_b = [info for name, info in checkpoint.tensors.items() if ".kv_b_proj.weight" in name and "layers.4" not in name]
    fp8 = sum(info.nbytes for info in kv_b if info.dtype.itemsize == 1)
    scales = sum(info.nbytes for info in kv_b if info.dtype.itemsize == 4)
    assert outside + sum(layers) == checkpoint.nbytes - mtp + fp8 - scales
    assert len(layers) == config.num_hidden_layers


def test_v2_lite_fits_an_h200_and_v3_only_in_part() -> None:
    h200 = 139 << 30
    lite = fit(RELEASED["v2-lite"], h200)
    assert lite.is_whole
    assert round(lite.weight_bytes / 1e9, 1) == 31.4
    v3 = fit(RELEASED["v3"], h200)
    assert not v3.is_whole
    assert 14 <= v3.num_layers <= 15
    assert fit(RELEASED["v3"], 8 * h200).is_whole


@pytest.mark.parametrize("cache", ["bf16", "fp8"])
@pytest.mark.parametrize("gigabytes", [1, 40, 141, 1200])
@pytest.mark.parametrize("name", ["v2-lite", "v3"])
def test_what_is_said_to_fit_fits_and_one_page_or_layer_more_does_not(name: str, gigabytes: int, cache: str) -> None:
    config, free, reserve = RELEASED[name], gigabytes * 10**9, 10**9
    result = fit(config, free, cache=cache, reserve_bytes=reserve)  # type: ignore[arg-type]
    outside, layers = weight_bytes_by_layer(config)

    def need(num_layers: int, tokens: int) -> int:
        per_token = cache_bytes_per_token(config, cache, num_layers)  # type: ignore[arg-type]
        return reserve + outside + sum(layers[:num_layers]) + tokens * per_token

    if result.num_layers == 0:
        assert result.context == 0
        assert need(1, 64) > free
        return
    assert result.context >= 64
    assert result.context % 64 == 0
    assert need(result.num_layers, result.context) <= free < need(result.num_layers, result.context + 64)
    if not result.is_whole:
        assert need(result.num_layers + 1, 64) > free
