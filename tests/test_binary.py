"""What was built: the stable torch ABI only, no library that a user may lack, kernels as they were meant.

The libraries are built once, against one torch; that they load in every torch from 2.11 on follows from the symbols
they ask for. tests/data/torch_2_11_shims.txt lists the stable functions which torch 2.11's libtorch_cpu.so exports.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from deepseek_ops import build_info
from deepseek_ops.library import library_path

TORCH, KERNELS = library_path("torch"), library_path("kernels")
NATIVE = sorted(Path(TORCH).parent.parent.glob("_native*.so"))
SHIMS = Path(__file__).parent / "data/torch_2_11_shims.txt"

GEMM_INSTRUCTIONS = {
    "QGMMA": "WGMMA on FP8",
    "UTMALDG": "TMA loads",
    "SYNCS": "mbarriers",
    "USETMAXREG": "registers moved from the producer to the math warpgroups",
}


def find_tool(name):
    """A CUDA binary tool: on PATH, in the toolkit, or from its wheel."""
    wheel = importlib.util.find_spec("nvidia.cu13") if importlib.util.find_spec("nvidia") else None
    folders = [f"{folder}/bin" for folder in (wheel.submodule_search_locations if wheel else [])]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join([*folders, "/usr/local/cuda/bin"]))


def output(tool, *args):
    found = find_tool(tool)
    if found is None:
        pytest.skip(f"no {tool} here")
    env = {**os.environ, "PATH": f"{Path(found).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([found, *map(str, args)], env=env, capture_output=True, text=True, check=True).stdout


def symbols(library, which):
    return {line.split()[-1].split("@")[0] for line in output("nm", "-D", which, library).splitlines() if line.strip()}


def dynamic(library, tag):
    return re.findall(rf"\({tag}\)\s+(?:.*\[(.*)\]|.*?:?\s*(.*))", output("readelf", "-dW", library))


def needed(library):
    return {bracketed for bracketed, _ in dynamic(library, "NEEDED")}


@functools.cache
def resource_usage():
    """Kernel -> {REG, STACK, SHARED, LOCAL, ...} of every kernel in the library."""
    text = output("cuobjdump", "--dump-resource-usage", KERNELS)
    found = re.findall(r"Function (\S+):\n\s*(.*)", text)
    return {name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)} for name, usage in found}


@functools.cache
def machine_code():
    """Kernel -> its instructions as text."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in output("cuobjdump", "-sass", KERNELS).splitlines():
        if function := re.match(r"\s*Function : (\S+)", line):
            name = function[1]
            found[name] = []
        elif name and re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            found[name].append(re.sub(r"/\*.*?\*/", "", line).strip())
    return found


@functools.cache
def instructions():
    """Kernel -> how often each instruction (without its modifiers) stands in it."""
    first = re.compile(r"(?:@!?U?P\w+\s+)?([A-Z0-9]+)")
    return {
        name: Counter(match[1] for line in lines if (match := first.match(line)))
        for name, lines in machine_code().items()
    }


needs_cuda = pytest.mark.skipif(not build_info["cuda"], reason="built without the CUDA kernels")


def test_the_torch_library_keeps_to_the_stable_abi():
    unstable = r"_ZNK?K?(2at|3c10|5torch)|_ZT[IVS]N(2at|3c10|5torch)|_?Py"
    assert not [name for name in symbols(TORCH, "--undefined-only") if re.match(unstable, name)]


def test_the_torch_library_asks_only_for_what_torch_2_11_has():
    available = {line for line in SHIMS.read_text().splitlines() if not line.startswith("#")}
    asked = {name for name in symbols(TORCH, "--undefined-only") if name.startswith(("aoti_", "torch_"))}
    assert asked <= available, f"not in torch 2.11: {sorted(asked - available)}"


def test_the_kernels_know_no_torch_and_no_python():
    banned = r"aoti_|torch_|_?Py|_ZNK?(2at|3c10|5torch)"
    assert not [name for name in symbols(KERNELS, "--undefined-only") if re.match(banned, name)]
    assert not [library for library in needed(KERNELS) if "torch" in library or "python" in library]


def test_the_kernels_export_their_c_interface_and_no_more():
    exported = symbols(KERNELS, "--defined-only")
    assert {"dso_last_error", "dso_built_with_cuda"} <= exported
    assert not [name for name in exported if not name.startswith("dso_")]


@pytest.mark.parametrize("library", [KERNELS, TORCH, *NATIVE], ids=lambda path: Path(path).name)
def test_no_library_is_needed_that_a_user_may_lack(library):
    # CUDA's runtime is linked in, its driver is looked up when it is called, and no torch but libtorch_cpu is named:
    # so the same files load with and without a GPU, a driver, a CUDA build of torch.
    system = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "ld-linux-x86-64.so.2", "libdl.so.2"}
    system |= {"libpthread.so.0", "librt.so.1"}
    ours = {"libdeepseek_kernels.so", "libtorch_cpu.so"}
    assert needed(library) <= system | ours, sorted(needed(library) - system - ours)


@pytest.mark.parametrize("library", [KERNELS, TORCH, *NATIVE], ids=lambda path: Path(path).name)
def test_the_cxx_runtime_is_the_one_that_torch_uses(library):
    # Two copies of libstdc++ in a process crash on the first exception that crosses between them.
    throws = {"__cxa_throw", "__cxa_allocate_exception", "_Znwm"}
    if throws & symbols(library, "--undefined-only"):
        assert "libstdc++.so.6" in needed(library)
    assert not throws & symbols(library, "--defined-only")


@pytest.mark.parametrize("library", [TORCH, *NATIVE], ids=lambda path: Path(path).name)
def test_libraries_find_each_other_wherever_they_are_installed(library):
    paths = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", output("readelf", "-dW", library))
    assert paths in (["$ORIGIN"], ["$ORIGIN/_lib"]), paths


@pytest.mark.parametrize("library", [KERNELS, TORCH], ids=lambda path: Path(path).name)
def test_libraries_are_hardened(library):
    headers = output("readelf", "-lW", library)
    assert "GNU_RELRO" in headers
    assert re.search(r"GNU_STACK.* RW ", headers), "the stack must not be executable"
    assert "NOW" in output("readelf", "-dW", library), "symbols must be bound at load, then read-only"


def test_messages_do_not_name_the_builder_s_folders():
    root = str(Path(__file__).resolve().parent.parent).encode()
    assert root not in Path(TORCH).read_bytes()


# ------------------------------------------------------------------------------------------------- kernels


@needs_cuda
def test_the_machine_code_is_for_the_stated_gpus_only():
    wanted = {f"sm_{arch}" for arch in build_info["archs"]}
    assert set(re.findall(r"\.(sm_\w+)\.cubin", output("cuobjdump", "-lelf", KERNELS))) == wanted
    assert ".ptx" not in output("cuobjdump", "-lptx", KERNELS), "PTX would be compiled on the user's machine, unseen"


@needs_cuda
def test_no_kernel_spills_or_uses_local_memory():
    usage = resource_usage()
    assert usage, "there are kernels"
    assert not {name: used for name, used in usage.items() if used["LOCAL"] or used["STACK"]}


@needs_cuda
def test_static_shared_memory_stays_within_the_default():
    assert not {name: used for name, used in resource_usage().items() if used["SHARED"] > 48 * 1024}


@needs_cuda
def test_the_gemm_is_made_of_hopper_s_instructions():
    kernels = {name: counts for name, counts in instructions().items() if "fp8_gemm" in name}
    assert kernels, "there are GEMM kernels"
    for name, counts in kernels.items():
        for instruction, what in GEMM_INSTRUCTIONS.items():
            if instruction == "USETMAXREG" and "swap_ab" in name:
                continue  # with few tokens nobody lacks registers
            assert counts[instruction], f"{name} has no {instruction}: no {what}"
        # By TMA where whole rows are the tile's, but not from swapped operands, nor half a panel of 64 columns.
        is_half = "Fp8GemmShapeILi1ELi32E" in name
        assert bool(counts["UTMASTG"]) == ("swap_ab" not in name and not is_half), name


@needs_cuda
def test_a_step_of_the_bf16_gemm_is_waits_and_wgmmas():
    """Between the first WGMMA of a step and the wait after its last there is nothing but uniform arithmetic."""
    kernels = {name: lines for name, lines in machine_code().items() if "bf16_gemm" in name}
    assert kernels, "there are GEMM kernels"
    for name, lines in kernels.items():
        assert instructions()[name]["UTMALDG"], f"{name} has no TMA loads"
        steps = re.findall(r"WARPGROUP\.ARRIVE.*?WARPGROUP\.DEPBAR", "\n".join(lines), re.S)
        assert steps, name
        for step in steps:
            assert step.count("HGMMA") == 4, f"{name}: 64 of K are four WGMMAs"
            assert not re.search(r"\b(LDS|STS|LDG|STG|MOV|BAR|LDL|STL)\b", step), f"{name}: {step}"


@needs_cuda
def test_what_starts_early_beside_the_gemms_waits_before_it_touches_memory_and_lets_the_next_start():
    """A wait that is missing shows on a GPU only, and there not always. Let go before it, the next kernel's CTAs take
    the place of this one's, and only wait there."""
    started_early = "moe_(map|perm|unperm|gate)|silu|rms_norm|rope|mla_cache|per_(token|block)_cast_to_fp8"
    kernels = {name: lines for name, lines in machine_code().items() if re.search(started_early, name)}
    assert kernels, "there are such kernels"
    for name, lines in kernels.items():
        before, wait, after = "\n".join(lines).partition("ACQBULK")
        assert wait, f"{name} does not wait"
        # A GEMM that is told that its weights are constant does not wait for the kernel that quantized them.
        assert ("PREEXIT" in after) == ("per_block" not in name), f"{name}: whether it lets the next kernel start"
        assert not re.search(r"\b(PREEXIT|LDG(STS)?|STG|LD|ST|RED|ATOMG|UBLKCP)\b", before), f"{name} waits too late"


@needs_cuda
def test_promotion_finds_its_operands_in_different_register_banks():
    """`sum += scale * partial` with sum and partial in one bank takes longer, and 64 of them are a step's."""
    for name, lines in machine_code().items():
        if "fp8_gemm" in name and "swap_ab" not in name and "k_grouped" not in name:  # whose scales differ by element
            pairs = re.findall(r"FFMA R\d+, R(\d+)(?:\.reuse)?, R\d+(?:\.reuse)?, R(\d+)", "\n".join(lines))
            assert pairs, name
            assert all(int(partial) % 2 != int(total) % 2 for partial, total in pairs), name


def late_reads(lines):
    """Loads from shared memory that may still be under way when a later arrival at a barrier is not: nothing between
    has used what they bring, nor fences them off.

    Whoever waits at that barrier may overwrite what they read. This happens: a K-grouped GEMM of 2 ms had a wrong tile
    in one of 300 calls.
    """
    words = {"32": 1, "64": 2, "128": 4}
    found = []
    for i, line in enumerate(lines):
        load = re.match(r"(?:@!?U?P\w+ +)?(LDSM?)(?:\.\S*?(64|128|\.[24]))? +R(\d+)", line)
        if load is None:
            continue
        count = words.get(load[2] or "32") or int(load[2][1:])
        brought = {f"R{int(load[3]) + word}" for word in range(count)}
        for later in lines[i + 1 :]:
            body = re.sub(r"^@!?U?P\w+ +", "", later)
            instruction, _, operands = body.partition(" ")
            if instruction.startswith("SYNCS.ARRIVE"):
                found.append(line)
            if re.match(r"SYNCS\.ARRIVE|FENCE\.VIEW\.ASYNC|MEMBAR", instruction):
                break
            writes_none = re.match(r"ST|RED|ATOM|BAR", instruction)
            used = set(re.findall(r"\bR\d+", operands if writes_none else operands.partition(",")[2]))
            if used & brought or (re.match(r"(BRA|EXIT|RET|BRX)\b", instruction) and body == later):
                break
    return found


def test_a_load_that_nothing_used_before_an_arrival_is_found():
    load, use = "LDS.64 R20, [R138+0x34de0] ;", "FMUL R22, R137, R21 ;"
    wide, arrive = "LDSM.16.M88.4 R8, [R1] ;", "@!P0 SYNCS.ARRIVE.TRANS64 RZ, [UR20] ;"
    assert late_reads([load, "FMUL R20, R1, R2 ;", arrive, use]) == [load]
    assert not late_reads([load, use, arrive])
    assert not late_reads([load, "STS [R2], R20 ;", arrive])
    assert not late_reads([load, "FENCE.VIEW.ASYNC.S ;", arrive, use])
    assert late_reads([wide, "MOV R3, R7 ;", "MOV R3, R12 ;", arrive]) == [wide]
    assert not late_reads([wide, "MOV R3, R11 ;", arrive])


@needs_cuda
def test_nothing_is_read_from_shared_memory_after_its_place_is_given_away():
    for name, lines in machine_code().items():
        late = late_reads(lines)
        if "mla_prefill" in name:
            # What all lanes read alike is a tile's place in the queue, which they keep until they take the next one:
            # the arrivals before that are at other barriers.
            late = [line for line in late if "[UR" not in line]
        assert not late, f"{name}: {late}"


@needs_cuda
def test_no_kernel_traps():
    for name, counts in instructions().items():
        assert not counts["BPT"], f"{name} can trap: a wrong input would end the process's CUDA context"
