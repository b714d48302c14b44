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
PIP = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]


def is_missing(requirement: str) -> bool:
    """Whether nothing of that name and of the version that it starts with is installed."""
    name, *version = re.split(r"\s*[=>]=\s*", requirement)
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return True
    return bool(version) and numbers(found) < numbers(version[0])


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def build_tools() -> list[str]:
    """What pyproject.toml needs for the build (in a regular expression: tomllib came with Python 3.11)."""
    found = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert found is not None, "pyproject.toml names its build requirements in one line"
    return re.findall(r'"([^"]+)"', found[1])


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
    absent = install_missing(build_tools())
    if subprocess.call([*PIP, "--no-build-isolation", "--no-deps", "-e", str(ROOT)]):
        hint = f"; it lacks {', '.join(absent)}, which could not be installed" if absent else ""
        raise SystemExit(f"deepseek_ops: the build failed{hint}")
    absent = install_missing(requirements(sys.argv[1:]))
    if absent:
        print(f"deepseek_ops: could not install {', '.join(absent)}: what needs them is skipped", flush=True)


if __name__ == "__main__":
    main()
