"""The op table: complete, right, and able to see a wrong result."""

import pytest
import torch

from deepseek_ops import op_table
from deepseek_ops.op_table import CASES, worst_row
from deepseek_ops.registry import OPS


def test_every_op_has_a_case():
    assert set(CASES) == set(OPS), "add the op to deepseek_ops/op_table.py"


@pytest.mark.parametrize("op", OPS)
def test_agrees_with_float64(op, device):
    error, ours, plain = op_table.run(op, device)
    assert error <= CASES[op].limit
    assert ours > 0
    assert plain > 0


@pytest.mark.parametrize("op", OPS)
def test_no_limit_is_so_wide_that_one_wrong_row_passes(op):
    torch.manual_seed(0)
    case = CASES[op]
    want = case.formula(torch.float64, *case.make("cpu"))
    rows = want.reshape(-1, want.shape[-1]).clone()
    last = rows.norm(dim=-1).nonzero()[-1]
    rows[last] *= 1.02
    assert worst_row(rows.view(want.shape), want) > case.limit


def test_a_nan_that_is_not_wanted_is_an_infinite_error():
    want = torch.tensor([[1.0, 2.0], [3.0, torch.nan]])
    assert worst_row(want, want) == 0
    assert worst_row(torch.full((2, 2), torch.nan), want) == float("inf")


def test_the_table_has_a_line_for_each_op_and_tells_whether_all_are_right(monkeypatch, capsys):
    errors = dict.fromkeys(OPS, 0.0)
    monkeypatch.setattr(op_table, "run", lambda op, device: (errors[op], 1e-6, 2e-6))
    assert op_table.print_op_table("cpu")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(OPS)
    assert all("reference on CPU" in line for line in lines[1:-1])

    errors["fp8_gemm_nt"] = 0.5
    assert not op_table.print_op_table("cpu")
    wrong = [line for line in capsys.readouterr().out.splitlines() if "wrong" in line]
    assert len(wrong) == 1
    assert wrong[0].startswith("fp8_gemm_nt ")
