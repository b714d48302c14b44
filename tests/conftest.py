"""Fixtures of the whole suite: the devices to run on, and a seed."""

import pytest
import torch

from tests.support import DEVICES


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn: the CPU always, the GPU where there is one."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
