"""The emulator itself: small programs that run in every order, and the mistakes in them that it must not let pass."""

from __future__ import annotations

import ctypes
import re

import pytest

from tests.emulator.build import CSRC, HERE, MISSING, build_programs

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

SEEDS = range(24)

MISTAKES = {
    "read_after_full": "wrong result",
    "release_after_every_lane": "wrong result",
    "release_after_wgmma": "wrong result: float .* is -?nan",
    "read_after_wgmma": "wrong result: float .* is -?nan",
    "multiply_halves": "wrong result",
    "fence_before_wgmma": "no wgmma.fence",
    "overwrite_after_the_store_has_read": "wrong result: byte .* is 0x39",
    "end_after_the_store_has_read": "ends before its TMA stores have read",
    "arrive_with_every_lane": "deadlock.*\n.*warp 0, 32 lanes from 0: the phase of parity 0 of the mbarrier at 0x",
    "arrive_once": "more arrivals than the 32",
    "expect_all_bytes": "16 bytes more than it was told to expect",
    "initialise_first": "no mbarrier was initialised",
    "keep_off_barriers": "was written over",
    "stay_together": "warp 0 has diverged",
    "stay_in_shared_memory": "access to shared memory at offset",
    "wait_for_cp_async": "wrong result: float .* is -?nan",
    "read_while_the_other_runs": "has ended",
    "send_when_the_other_runs": "no mbarrier was initialised|has ended|while its shared memory is used",
}
"""Program of programs.cu -> what the emulator says of it where it is broken."""


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    library = ctypes.CDLL(str(build_programs(tmp_path_factory.mktemp("programs"))))
    library.dso_last_error.restype = ctypes.c_char_p
    library.emulator_set.argtypes = [ctypes.c_int, ctypes.c_uint64]

    def run(program: str, is_broken: bool, seed: int) -> str:
        """What went wrong; nothing, if nothing did."""
        library.emulator_set(4, seed)
        status = library.run_program(program.encode(), is_broken)
        return library.dso_last_error().decode() if status else ""

    return run


@pytest.mark.parametrize("program", MISTAKES)
def test_a_program_that_waits_for_all_it_needs_is_right_in_every_order(program, run):
    assert {run(program, False, seed) for seed in SEEDS} == {""}


@pytest.mark.parametrize("program", MISTAKES)
def test_a_mistake_shows_within_a_few_seeds(program, run):
    said = [run(program, True, seed) for seed in SEEDS]
    caught = [message for message in said if message]
    print(f"{len(caught)} of {len(SEEDS)} seeds")
    assert caught
    assert all(re.search(MISTAKES[program], message) for message in caught), caught


def test_a_seed_gives_the_same_every_time(run):
    assert run("release_after_every_lane", True, 3) == run("release_after_every_lane", True, 3)


@pytest.mark.parametrize("header", sorted((CSRC / "ptx").glob("*.cuh")), ids=lambda path: path.name)
def test_every_instruction_is_emulated(header):
    wanted = set(re.findall(r"^DSO_DEVICE .*?(\w+)\(", header.read_text(), flags=re.M))
    emulated = set(re.findall(r"(\w+)\(", (HERE / "ptx" / header.name).read_text()))
    assert wanted <= emulated, "write it in tests/emulator/, as the hardware does it"
