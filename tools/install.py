"""Builds and installs the package into the Python that runs this, with what it needs and does not have yet.

    python tools/install.py [EXTRA ...]      extras of pyproject.toml: test, lint, plots

What is there already is not looked up anywhere, so without a network this works as far as things are there. A test
tool that cannot be had is named, and the tests that need it skip themselves; the build and its tools must succeed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD_TOOLS = ["setuptools>=64", "wheel", "cmake>=3.24", "ninja", "pybind11>=2.13"]
PIP = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]


def is_missing(requirement: str) -> bool:
    """Whether nothing of that name is installed; that its version fits is left to pip, where pip has a choice."""
    try:
        metadata.version(re.split(r"[\s<>=!~;\[(]", requirement, maxsplit=1)[0])
    except metadata.PackageNotFoundError:
        return True
    return False


def requirements(extras: list[str]) -> list[str]:
    """What the installed package asks for, of its own and for `extras`."""
    wanted = []
    for line in metadata.requires("deepseek-ops") or []:
        requirement, _, marker = line.partition(";")
        of_extra = re.search(r"extra == [\"'](\w+)", marker)
        if of_extra is None or of_extra[1] in extras:
            wanted.append(requirement.strip())
    return wanted


def install_missing(wanted: list[str]) -> list[str]:
    """Installs what is missing and returns what could not be had."""
    missing = [requirement for requirement in wanted if is_missing(requirement)]
    if not missing or subprocess.call([*PIP, "--retries", "1", *missing]) == 0:
        return []
    # One unavailable package fails pip's whole call: the others may still be had.
    return [one for one in missing if subprocess.call([*PIP, "--retries", "0", one], stderr=subprocess.DEVNULL)]


def main() -> None:
    absent = install_missing(BUILD_TOOLS)
    if subprocess.call([*PIP, "--no-build-isolation", "--no-deps", "-e", str(ROOT)]):
        hint = f"; it lacks {', '.join(absent)}, which could not be installed" if absent else ""
        raise SystemExit(f"deepseek_ops: the build failed{hint}")
    absent = install_missing(requirements(sys.argv[1:]))
    if absent:
        print(f"deepseek_ops: could not install {', '.join(absent)}: what needs them is skipped", flush=True)


if __name__ == "__main__":
    main()
