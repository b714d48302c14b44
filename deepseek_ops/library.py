"""Finds and loads what was compiled: the torch ops, their kernels, and a record of how they were built.

Imports neither torch nor CUDA: the NumPy/CuPy door needs the record, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["build_info", "library_path"]

_FOLDER = Path(__file__).parent / "_lib"


def library_path(name: str) -> Path:
    """Where `name` ("torch" or "kernels") lies."""
    return _FOLDER / f"libdeepseek_{name}.so"


def _read_build_info() -> dict[str, Any]:
    try:
        info: dict[str, Any] = json.loads((_FOLDER / "build_info.json").read_text())
    except FileNotFoundError:
        raise ImportError(
            "deepseek_ops is not compiled: run 'pip install --no-build-isolation -e .' in its source folder"
        ) from None
    return info


build_info: dict[str, Any] = _read_build_info()
"""How this package was compiled: cuda (bool), archs, nvcc, torch_built, torch_min, version."""
