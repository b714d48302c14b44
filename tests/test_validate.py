"""The debugging checks name the first entry that is wrong, and are silent about good ones."""

import pytest
import torch

from deepseek_ops import validate_block_table, validate_m_indices, validate_masked_m, validate_offsets

INT_MAX = 2**31 - 1
INT_MIN = -(2**31)


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("groups", [[], [0], [-1] * 300, [2] * 100 + [-1] * 28 + [0] * 128 + [-1] * 3 + [1] * 7])
def test_good_m_indices_pass(groups, device):
    validate_m_indices(int32(groups, device), 3)


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (130, 3, r"m_indices\[130\] must be a group below 3, or -1, got 3"),
        (0, -2, r"m_indices\[0\] must be a group below 3, or -1, got -2"),
        (299, INT_MAX, rf"m_indices\[299\] must be .*, got {INT_MAX}"),
        (299, INT_MIN, rf"m_indices\[299\] must be .*, got {INT_MIN}"),
        (129, 0, r"m_indices\[129\] must be 1 as earlier in its segment of 128 rows, or -1, got 0"),
    ],
)
def test_bad_m_indices_are_named(row, value, message, device):
    groups = int32([1] * 300, device)
    groups[row] = value
    with pytest.raises(ValueError, match=f"^{message}$"):
        validate_m_indices(groups, 3)


@pytest.mark.parametrize("offsets", [[0], [0, 0, 5, 5, 10], [3, 7], [10, 10]])
def test_good_offsets_pass(offsets, device):
    validate_offsets(int32(offsets, device), 10)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([-1, 5], r"offsets\[0\] must be from 0 to 10, got -1"),
        ([0, 5, 11], r"offsets\[2\] must be from 0 to 10, got 11"),
        ([0, 7, 6, 10], r"offsets\[2\] must be at least the offset before it, got 6"),
    ],
)
def test_bad_offsets_are_named(offsets, message, device):
    with pytest.raises(ValueError, match=f"^{message}$"):
        validate_offsets(int32(offsets, device), 10)


def test_offsets_may_have_to_be_multiples(device):
    validate_offsets(int32([0, 128, 384], device), 384, multiple_of=128)
    with pytest.raises(ValueError, match=r"^offsets\[1\] must be a multiple of 128, got 130$"):
        validate_offsets(int32([0, 130, 384], device), 384, multiple_of=128)


@pytest.mark.parametrize("value", [-1, 9, INT_MAX])
def test_bad_masked_m_is_named(value, device):
    validate_masked_m(int32([0, 8, 3], device), 8)
    with pytest.raises(ValueError, match=rf"^masked_m\[1\] must be from 0 to 8, got {value}$"):
        validate_masked_m(int32([8, value, -5], device), 8)


def test_entries_past_a_length_may_hold_anything(device):
    table = int32([[3, -1, INT_MAX], [INT_MIN, 7, 9], [0, 1, 2]], device)
    validate_block_table(table, int32([4, 0, 12], device), num_pages=4, page_size=4)


@pytest.mark.parametrize("value", [-1, 4, INT_MAX, INT_MIN])
def test_a_bad_page_in_use_is_named(value, device):
    table = int32([[3, -1, -1], [0, value, 9]], device)
    with pytest.raises(ValueError, match=rf"^block_table\[1, 1\] must be a page below 4, got {value}$"):
        validate_block_table(table, int32([4, 5], device), num_pages=4, page_size=4)


@pytest.mark.parametrize("value", [-1, 13, INT_MAX])
def test_a_length_beyond_the_table_is_named(value, device):
    table = int32([[0, 1, 2], [0, 1, 2]], device)
    with pytest.raises(ValueError, match=rf"^cache_seqlens\[1\] must be from 0 to 12, .*, got {value}$"):
        validate_block_table(table, int32([12, value], device), num_pages=4, page_size=4)


def test_wrong_types_are_refused(device):
    with pytest.raises(TypeError, match=r"^validate_offsets: offsets must be int32, got int64"):
        validate_offsets(torch.zeros(2, dtype=torch.int64, device=device), 4)
    with pytest.raises(ValueError, match=r"^validate_block_table: cache_seqlens must be \[2\], got \[3\]"):
        validate_block_table(int32([[0], [1]], device), int32([0, 0, 0], device), 4, 4)
