"""The kernels on an emulated GPU, built once."""

from __future__ import annotations

import pytest

from tests.emulator.build import build_kernels
from tests.emulator.interface import Kernels


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return build_kernels(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def kernels(library):
    return Kernels(library)
