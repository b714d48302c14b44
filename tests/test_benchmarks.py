"""The measuring itself: the harness on a fake clock, absent peers, the report, the GPU suite with faked stages."""

import dataclasses
import json
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import deepseek_ops
from benchmarks import conftest, decode, gpu_suite, harness, peers, report, shapes, sweep_mla_plans
from benchmarks.gpu_suite import Outcome, Stage
from benchmarks.harness import OURS, Case, Results
from deepseek_ops import bench, gpu_state
from deepseek_ops.bench import Ceilings, HostClock, Ratio, measure
from deepseek_ops.model.tiny import tiny_config
from tests import sanitizer
from tests.support import quantized_operands

# ------------------------------------------------------------------------------------------------- the harness


class FakeClock:
    """Each provider's calls return their own duration, which grows a little with every run of anything."""

    name = "fake"

    def __init__(self):
        self.order = []

    def prepare(self, calls):
        clock = self

        class FakeTimed:
            def __init__(self):
                self.outputs = [call() for call in calls]

            def run(self):
                clock.order.append(self.outputs[0])
                return self.outputs[0] * (1 + 0.01 * len(clock.order))

        return FakeTimed()


def refusing_clock(message):
    class RefusingClock:
        name = "refusing"

        def prepare(self, calls):
            raise RuntimeError(message)

    return RefusingClock()


def fake_measure(calls, **options):
    clock = FakeClock()
    return clock, measure(calls, device="cpu", warm_up=0.0, clocks=[clock], **options)


def test_every_round_runs_each_provider_once_and_the_first_one_twice():
    clock, measured = fake_measure({"ours": [lambda: 1.0], "theirs": [lambda: 2.0]}, replays=20)
    rounds = [clock.order[i : i + 3] for i in range(0, len(clock.order), 3)]
    assert len(rounds) == 20
    assert all(sorted(x) == [1.0, 1.0, 2.0] for x in rounds)
    assert len({tuple(x) for x in rounds}) == 3, "the order must change between rounds"
    assert len(measured.samples["ours"]) == len(measured.again) == len(measured.samples["theirs"]) == 20


def test_drift_that_hits_all_providers_leaves_the_ratio_alone():
    _, measured = fake_measure({"ours": [lambda: 1.0], "theirs": [lambda: 2.0]}, replays=31)
    assert measured.samples["ours"][-1] > 1.5 * measured.samples["ours"][0]
    assert measured.ratio("theirs").median == pytest.approx(2.0, rel=0.02)
    assert measured.noise.median == pytest.approx(1.0, rel=0.02)
    assert measured.noise.low <= measured.noise.median <= measured.noise.high


def test_median_and_iqr_are_those_of_the_samples():
    _, measured = fake_measure({"ours": [lambda: 1.0]}, replays=5)
    samples = measured.samples["ours"]
    assert measured.median("ours") == statistics.median(samples)
    assert measured.iqr("ours") == pytest.approx(sorted(samples)[3] - sorted(samples)[1])


def test_the_interval_of_a_ratio_holds_the_median_and_widens_with_the_spread():
    quiet = Ratio.paired([2.0, 2.01, 1.99, 2.0, 2.0], [1.0] * 5)
    wild = Ratio.paired([1.0, 3.0, 2.0, 4.0, 0.5], [1.0] * 5)
    assert quiet.low <= quiet.median == 2.0 <= quiet.high
    assert wild.high - wild.low > 10 * (quiet.high - quiet.low)


def test_a_peer_that_fails_is_absent_with_its_reason_and_ours_is_not_forgiven():
    def broken():
        raise ValueError("no such\nlayout")

    _, measured = fake_measure({"ours": [lambda: 1.0], "theirs": [broken]}, replays=3)
    assert measured.absent == {"theirs": "ValueError: no such layout"}
    assert list(measured.samples) == ["ours"]
    with pytest.raises(ValueError, match="no such"):
        fake_measure({"ours": [broken], "theirs": [lambda: 1.0]}, replays=3)


def test_calls_that_one_clock_cannot_capture_go_to_the_next():
    clocks = [refusing_clock("not permitted when stream is capturing"), FakeClock()]
    measured = measure({"ours": [lambda: 1.0]}, device="cpu", warm_up=0.0, clocks=clocks, replays=3)
    assert measured.clocks == {"ours": "fake"}
    with pytest.raises(RuntimeError, match="really broken"):
        measure({"ours": [lambda: 1.0]}, device="cpu", clocks=[clocks[0], refusing_clock("really broken")])


def test_one_replay_is_refused():
    with pytest.raises(ValueError, match="replays must be 2 or more, got 1"):
        fake_measure({"ours": [lambda: 1.0]}, replays=1)


def test_providers_may_have_any_name():
    _, measured = fake_measure({"again": [lambda: 1.0], "it": [lambda: 2.0]}, replays=5)
    assert measured.ratio("it").median == pytest.approx(2.0, rel=0.1)


def test_ceilings_come_from_the_same_harness():
    found = bench.ceilings("cpu")
    assert 0.1 < found.copy_gbps < 1e4
    assert 0.1 < found.read_gbps < 1e4
    assert found.fp8_tflops is None


def test_on_a_cpu_the_host_clock_times_every_input_set():
    seen = []
    measured = measure({"ours": [partial(seen.append, i) for i in range(3)]}, device="cpu", warm_up=0.0, replays=2)
    assert measured.clocks == {"ours": HostClock.name}
    assert seen == [0, 1, 2] * 5  # prepared once, then two runs in each of two rounds
    assert all(x > 0 for x in measured.samples["ours"])


@pytest.mark.parametrize(("num_bytes", "sets"), [(0, 256), (1, 256), (15_000_000, 20), (299e6, 2), (1e9, 1)])
def test_input_sets_exceed_the_l2_cache_together(num_bytes, sets):
    assert bench.num_input_sets(num_bytes) == sets


def test_the_floor_is_the_larger_of_arithmetic_and_memory():
    ceilings = Ceilings(copy_gbps=3000.0, read_gbps=4000.0, fp8_tflops=1000.0)
    assert ceilings.floor(flops=1e12, num_bytes=4e6) == pytest.approx(1e-3)
    assert ceilings.floor(flops=1e6, num_bytes=4e9) == pytest.approx(1e-3)
    assert Ceilings(1e9, 1e9, 1000.0, 500.0).floor(1e12, 1, torch.bfloat16) == pytest.approx(2e-3)
    assert Ceilings(4000.0, 3000.0, None).floor(flops=1e15, num_bytes=4e9) == pytest.approx(1e-3)


def test_conditions_name_versions_and_revision():
    found = bench.conditions("cpu")
    assert found["torch"] == torch.__version__
    assert len(found["csrc_sha256"]) == 64
    assert {"date", "device", "cuda", "git_revision", "git_dirty", "data"} <= set(found)


def test_the_hash_of_the_sources_sees_content_and_names(tmp_path):
    def hash_of(name, text):
        folder = tmp_path / f"{name}-{text}" / "csrc"
        folder.mkdir(parents=True)
        (folder / name).write_text(text)
        return bench.revision(folder.parent)["csrc_sha256"]

    assert hash_of("a.cu", "x") != hash_of("a.cu", "y")
    assert hash_of("a.cu", "x2") != hash_of("b.cu", "x2")
    assert bench.revision(tmp_path)["csrc_sha256"] is None


def test_the_fields_of_nvidia_smi_are_told_apart():
    assert bench._parse_smi(("driver_version", "power.limit"), "580.1, 700.00 W\n") == {
        "driver_version": "580.1",
        "power.limit": "700.00 W",
    }
    assert bench._parse_smi(("driver_version", "power.limit"), "Field is not valid") == {}


FAKE_NVML = """
#include <string.h>
static int device, runs;
typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    int type, status;
    union { double d; unsigned u; unsigned long long l; } value;
} Field;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **found) { *found = &device; return strcmp(uuid, "GPU-1") != 0; }
int nvmlDeviceGetClockInfo(void *d, int clock, unsigned *mhz) {
    *mhz = clock == 2 ? 3201 : 1500 + 100 * (runs++ % 2);
    return d != &device;
}
int nvmlDeviceGetTemperature(void *d, int sensor, unsigned *celsius) { *celsius = 60; return d != &device; }
int nvmlDeviceGetPowerUsage(void *d, unsigned *mw) { *mw = 300000; return d != &device; }
int nvmlDeviceGetCurrentClocksEventReasons(void *d, unsigned long long *bits) { *bits = 1ull << 34 | 4; return 0; }
int nvmlDeviceGetFieldValues(void *d, int count, Field *x) {
    x->value.u = 690500;
    x->status = STATUS;
    return d != &device || count != 1 || x->field != 186 || x->scope != 0;
}
"""


def fake_nvml(tmp_path, status):
    source, library = tmp_path / f"nvml{status}.c", tmp_path / f"libnvml{status}.so"
    source.write_text(FAKE_NVML)
    subprocess.run(["cc", "-shared", "-fPIC", f"-DSTATUS={status}", str(source), "-o", str(library)], check=True)
    return gpu_state.Nvml("GPU-1", str(library))


def test_clocks_power_and_temperature_are_read_from_the_drivers_library(tmp_path):
    want = {"clocks.sm": 1500, "clocks.mem": 3201, "power.draw": 690.5, "temperature.gpu": 60}
    assert fake_nvml(tmp_path, 0).read() == {**want, "clocks_event_reasons.active": 1 << 34 | 4}
    assert fake_nvml(tmp_path, 3).read()["power.draw"] == 300.0, "where there is no power of the moment"
    with pytest.raises(OSError, match="knows no GPU-2"):
        gpu_state.Nvml("GPU-2", str(tmp_path / "libnvml0.so"))


def test_the_gpu_state_is_read_while_the_samples_are_taken(tmp_path, monkeypatch):
    class Watch(gpu_state.Watch):
        def __init__(self, device):
            super().__init__("cpu")
            self._nvml = fake_nvml(tmp_path, 0)

    monkeypatch.setattr(bench, "Watch", Watch)
    calls = {"ours": [partial(time.sleep, 0.01)]}
    state = measure(calls, device="cpu", warm_up=0.0, replays=15).gpu_state
    assert state["readings"] > 3
    assert state["clocks.sm"] == [1500, state["clocks.sm"][1], 1600]
    assert state["power.draw"] == [690.5] * 3
    assert state["clocks_event_reasons.active"] == "0x0000000400000004"
    json.dumps(state)


def test_where_there_is_no_gpu_there_is_no_state():
    _, measured = fake_measure({"ours": [lambda: 1.0]}, replays=3)
    assert measured.gpu_state == {}


@pytest.mark.gpu
@pytest.mark.skipif(not shapes.GPU, reason="no GPU")
def test_a_graph_of_a_copy_takes_about_the_time_that_its_bytes_need():
    x, y = torch.randn(2, 1 << 28, device="cuda")
    measured = measure({"copy": [lambda: y.copy_(x)], "again": [lambda: y.copy_(x)]}, replays=15)
    assert measured.clocks["copy"] == "cuda graph"
    assert measured.gpu_state["clocks.sm"][2] > 100
    assert measured.gpu_state["power.draw"][2] > 50
    assert 0.2e-3 < measured.median("copy") < 3e-3
    assert 0.9 < measured.ratio("again").median < 1.1
    assert torch.equal(x, y)


# --------------------------------------------------------------------------------------------- a case's results


def make_case(ours=lambda x: lambda: 2 * x, **others):
    return Case(
        op="cast_to_fp8",
        case="8 x 4",
        make=lambda seed: (torch.full((8, 4), seed + 1.0),),
        providers={OURS: ours, **others},
        error=lambda inputs, out: harness.worst_row(out, 2 * inputs[0]),
        limit=1e-6,
        flops=1e6,
        num_bytes=2e8,
    )


def run_case(case):
    return harness.run(case, "cpu", Ceilings(100.0, 90.0, None), warm_up=0.0, replays=5)[1]


def test_a_row_of_the_results_has_every_provider_or_its_reason():
    def absent(x):
        raise peers.Absent("no such library")

    row = run_case(make_case(theirs=lambda x: lambda: x + x, gone=absent))
    ours, theirs = row["providers"][OURS], row["providers"]["theirs"]
    assert row["providers"]["gone"] == {"absent": "Absent: no such library"}
    assert "ratio" not in ours
    assert len(theirs["ratio"]) == 3
    assert ours["n"] == len(ours["samples_us"]) == 5
    assert ours["correct"]
    assert theirs["correct"]
    assert row["floor_us"] == pytest.approx(2e8 / 100e9 * 1e6)
    assert ours["share_of_floor"] == pytest.approx(row["floor_us"] / ours["median_us"])
    assert ours["gbps"] == pytest.approx(2e8 / ours["median_us"] / 1e3)
    json.dumps(row)


def test_a_wrong_result_of_ours_fails_and_a_peers_is_marked():
    with pytest.raises(AssertionError, match=r"cast_to_fp8 at 8 x 4: error 5\.0e-01"):
        run_case(make_case(ours=lambda x: lambda: x))
    with pytest.raises(AssertionError, match="cast_to_fp8 at 8 x 4"):
        harness.run_once(make_case(ours=lambda x: lambda: x))
    assert run_case(make_case(theirs=lambda x: lambda: x))["providers"]["theirs"]["correct"] is False


def test_a_variant_of_ours_must_run_and_be_right_and_a_peer_need_not():
    right, wrong = lambda x: lambda: x + x, lambda x: lambda: x
    row = run_case(make_case(batch_invariant=right, theirs=wrong))
    assert row["providers"]["batch_invariant"]["ratio"][0] > 0
    for broken in (wrong, lambda x: 1 / 0):
        case = make_case(batch_invariant=broken)
        with pytest.raises((AssertionError, ZeroDivisionError)):
            run_case(case)
        with pytest.raises((AssertionError, ZeroDivisionError)):
            harness.run_once(case)


def test_variants_of_the_gemm_are_measured_where_rows_are_few():
    from benchmarks import bench_gemm

    few, many = shapes.Gemm(4, 256, 512), shapes.Gemm(4096, 256, 512)
    assert bench_gemm.variants(many) == {}
    assert bench_gemm.variants(few).keys() == {x for x, (op, _) in report.VARIANTS.items() if op == "fp8_gemm_nt"}
    a, sfa, b, sfb, dtype = inputs = bench_gemm.operands(few, 0)
    for prepare in bench_gemm.variants(few).values():
        out = prepare(*inputs)()
        assert torch.equal(out, deepseek_ops.fp8_gemm_nt(a, sfa, b, sfb, out_dtype=dtype, batch_invariant=True))


def test_variants_of_decoding_are_measured_and_right():
    from benchmarks import bench_mla

    assert bench_mla.variants(shapes.Mla(2, 1, 70, 4)) == {}
    variants = bench_mla.variants(bench_mla.VARIED[0])
    assert variants.keys() == {x for x, (op, _) in report.VARIANTS.items() if op == "mla_decode"}
    inputs = bench_mla.inputs(shapes.Mla(2, 2, 130, 16), 0)
    for prepare in variants.values():
        assert bench_mla.error(inputs, prepare(*inputs)()) <= bench_mla.MLA_LIMIT


def test_the_last_input_set_is_verified_too():
    stale = torch.full((8, 4), 2.0)  # right for the first input set alone
    with pytest.raises(AssertionError, match="error"):
        run_case(make_case(ours=lambda x: lambda: stale))


def test_results_are_written_after_each_case(tmp_path):
    path = tmp_path / "new" / "results.json"
    results = Results(path, "cpu")
    results.add({"op": "a"})
    results.add_host("torch.add", 1.0)
    assert [row["op"] for row in json.loads(path.read_text())["cases"]] == ["a"]
    assert json.loads(path.read_text())["host"] == [{"call": "torch.add", "us": 1.0}]
    Results(None, "cpu").add({"op": "a"})


def session(path, seconds):
    results = Results(path, "cpu", seconds)
    results._ceilings = Ceilings(100.0, 90.0, None)
    results.content["conditions"] = {"date": "today"}
    return results


def test_no_case_begins_that_would_end_too_late(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "run", lambda *_: (time.sleep(0.2), {"op": "a", "case": "b"}))
    results = session(tmp_path / "results.json", 0.5)
    ran = [results.measure(make_case()) is None for _ in range(4)]
    assert [row["date"] for row in results.content["cases"]] == ["today"] * 2, "two of 0.2 s fit into 0.5 s"
    assert len(ran) == 4
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["missing"] == [{"op": "cast_to_fp8", "case": "8 x 4", "why": report.OUT_OF_TIME}] * 2


def test_a_case_that_fails_is_missing_with_its_reason(tmp_path):
    results = session(tmp_path / "results.json", 60)
    with pytest.raises(AssertionError):
        results.measure(make_case(ours=lambda x: lambda: x))
    [missing] = results.content["missing"]
    assert missing["why"].startswith("AssertionError: cast_to_fp8 at 8 x 4: error")


def test_only_peers_that_compile_are_called_ahead_and_their_failures_are_no_concern():
    called = []

    def deep_gemm(x):
        called.append("deep_gemm")
        raise RuntimeError("no compiler")

    harness.compile_peers(make_case(deep_gemm=deep_gemm, theirs=lambda x: called.append("theirs")))
    assert called == ["deep_gemm"]


def test_each_share_of_the_cases_is_compiled_by_a_process_and_none_is_waited_for_too_long(tmp_path):
    def command(code):
        return [sys.executable, "-c", code, str(tmp_path)]

    touch = "import sys, pathlib; pathlib.Path(sys.argv[1], sys.argv[2].replace('/', ' of ')).touch()"
    conftest.compile_in_parallel(command(touch), 3)
    assert sorted(x.name for x in tmp_path.iterdir()) == [f"--compile-peers={i} of 3" for i in range(3)]
    start = time.monotonic()
    conftest.compile_in_parallel(command("import time; time.sleep(60)"), 2, seconds=0.5)
    assert time.monotonic() - start < 20


def collected(*options):
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_gemm.py", "benchmarks/bench_grouped_gemm.py"]
    command += ["--collect-only", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_cases_are_chosen_by_name_and_the_shares_of_compilers_are_all_of_them():
    every = collected()
    some = collected("--cases", r"gemm_nt\[(1|130) x")
    assert some == [x for x in every if "gemm_nt[1 x" in x or "gemm_nt[130 x" in x] != []
    shares = [collected(f"--compile-peers={i}/2") for i in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(every)
    assert abs(len(shares[0]) - len(shares[1])) <= 1


def test_the_replayed_clock_gives_pytest_benchmark_our_samples():
    clock = harness.ReplayClock()
    start = clock()
    clock.advance(0.25)
    assert clock() - start == 0.25


def test_worst_rows_are_chosen_from_end_to_end():
    assert harness.some_rows(3, "cpu").tolist() == [0, 1, 2]
    rows = harness.some_rows(4096, "cpu")
    assert len(rows) == 64
    assert (rows[0], rows[-1]) == (0, 4095)


def test_the_38_measured_cases_are_there_once_each():
    cases = [*map(str, shapes.DENSE), *map(str, shapes.CONTIGUOUS), *(f"masked {x}" for x in shapes.MASKED)]
    assert len(cases) == len(set(cases)) == 38
    assert len(set(map(str, shapes.MLA))) == len(shapes.MLA) == 34


def test_deep_gemms_own_list_is_there_and_no_shape_twice():
    dense = (*shapes.DENSE, *shapes.SMALL_M, *shapes.LATENT, *shapes.DGRAD)
    weights = {(2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)}
    assert {(m, n, k) for m in (1, 128, 4096) for n, k in weights} <= {(x.m, x.n, x.k) for x in dense}
    assert {(4096, k, n) for n, k in weights} <= {(x.m, x.n, x.k) for x in dense}
    later = {(6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048)}
    contiguous = (*shapes.CONTIGUOUS, *shapes.CONTIGUOUS_LATER)
    masked = (*shapes.MASKED, *shapes.MASKED_LATER)
    for grouped, loads in ((contiguous, 2), (masked, 4)):
        assert sum((x.n, x.k) in later for x in grouped) == loads * len(later)
    k_grouped = (*shapes.K_GROUPED, *shapes.K_GROUPED_EMPTY)
    for family in (dense, contiguous, masked, k_grouped):
        assert len(set(map(str, family))) == len(family)


def test_the_mla_cases_are_those_of_the_peers_table_and_a_grid_between_them():
    between = {(b, s_k, h) for b in (1, 2, 4, 8, 32) for s_k in (512, 2048, 4096, 32768) for h in (8, 16, 128)}
    cases = (*shapes.MLA, *shapes.MLA_BETWEEN, *shapes.MLA_FP8)
    assert between <= {(x.batch, x.s_k, x.heads) for x in cases if x.s_q == 1 and x.cache == "bf16"}
    assert len(set(map(str, cases))) == len(cases) == 34 + 59 + 54


def test_mla_counts_the_work_as_its_peers_do():
    x = shapes.Mla(128, 2, 4096, 128)
    assert x.flops == 2 * 128 * 128 * 2 * 4096 * (576 + 512)
    assert x.num_bytes == 128 * (2 * 128 * 576 * 2 + 4096 * 576 * 2 + 2 * 128 * 512 * 2)
    assert shapes.Mla(1, 1, 4096, 16, "fp8").num_bytes == 4096 * 656 + 16 * 2 * (576 + 512)


def test_a_group_without_tokens_has_no_columns_and_costs_no_arithmetic():
    full, empty = shapes.KGroupedGemm(3, 40, 136, 256), shapes.KGroupedGemm(3, 40, 136, 256, empty=1)
    assert empty.counts() == [full.counts()[0], 0, full.counts()[2]]
    assert full.flops - empty.flops == 2 * 40 * 136 * full.counts()[1]


# ------------------------------------------------------------------------------------------------------- peers


def test_peers_that_are_not_there_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "folder", None)
    with pytest.raises(peers.Absent, match="--peers DIR was not given"):
        peers._find("_flashmla_C.abi3.so")
    monkeypatch.setattr(peers, "folder", tmp_path)
    with pytest.raises(peers.Absent, match="no _flashmla_C"):
        peers._find("_flashmla_C.abi3.so")


def test_every_peer_is_absent_on_a_cpu_without_a_crash(monkeypatch):
    monkeypatch.setattr(peers, "folder", None)
    from benchmarks import bench_gemm, bench_mla

    gemm = bench_gemm.operands(shapes.Gemm(4, 256, 512), 0)
    mla = bench_mla.inputs(shapes.Mla(1, 1, 64, 4), 0)
    for providers, inputs in (
        (peers.dense_gemm(), gemm),
        (peers.contiguous_gemm(), gemm),
        (peers.masked_gemm(8), gemm),
        (peers.k_grouped_gemm(), gemm),
        (bench_mla.rivals(shapes.Mla(1, 1, 64, 4)), mla),
    ):
        calls = {OURS: [lambda: 0.0]}
        absent = {}
        for name, prepare in providers.items():
            try:
                calls[name] = [prepare(*inputs)]
            except Exception as failure:
                absent[name] = bench.reason(failure)
        measured = measure(calls, device="cpu", warm_up=0.0, replays=2)
        assert {*absent, *measured.absent, *measured.samples} == {OURS, *providers}
        assert "deep_gemm" not in providers or "--peers" in absent["deep_gemm"]


class FakeDeepGemm:
    """What the K-grouped call is promised to do, from the flat layout that it is given."""

    def get_mn_major_tma_aligned_tensor(self, scales):
        return scales.T.contiguous().T

    def k_grouped_fp8_gemm_nt_contiguous(self, a, b, d, counts, counts_on_device, c):
        assert counts_on_device.tolist() == counts
        m, n = d.shape[1:]
        x, y = (
            torch.cat([part.view(rows, -1) for part in data.double().split([rows * k for k in counts])], 1)
            * scales.double().repeat_interleave(128, 1)
            for (data, scales), rows in ((a, m), (b, n))
        )
        products = [p @ q.T for p, q in zip(x.split(counts, 1), y.split(counts, 1), strict=True)]
        d.copy_(c + torch.stack(products))


def test_the_k_grouped_peer_gets_each_groups_columns_by_themselves(monkeypatch):
    from benchmarks import bench_grouped_gemm

    monkeypatch.setattr(peers, "_deep_gemm", FakeDeepGemm)
    for shape in shapes.K_GROUPED_STAND_INS:
        inputs = bench_grouped_gemm.k_grouped_operands(shape, 0)
        call = peers.k_grouped_gemm()["deep_gemm"](*inputs)
        for _ in range(2):  # a second call must not add to the first one's result
            assert bench_grouped_gemm.k_grouped_error(inputs, call()) < 1e-6


def test_a_k_grouped_peer_that_is_wrong_is_shown_as_wrong_and_counts_nowhere(monkeypatch):
    from benchmarks import bench_grouped_gemm

    class Wrong(FakeDeepGemm):
        def k_grouped_fp8_gemm_nt_contiguous(self, a, b, d, *others):
            super().k_grouped_fp8_gemm_nt_contiguous(a, b, d, *others)
            d[-1, -1] *= 2

    monkeypatch.setattr(peers, "_deep_gemm", Wrong)
    monkeypatch.setattr(bench, "num_input_sets", lambda _: 1)
    ran = []
    bench_grouped_gemm.test_k_grouped_fp8_gemm_nt(ran.append, shapes.K_GROUPED_STAND_INS[0])
    row = run_case(ran[0])
    assert row["providers"][OURS]["correct"]
    assert row["providers"]["deep_gemm"]["correct"] is False
    results = {**results_of(), "cases": [row]}
    assert "(its result is wrong)" in report.table("k_grouped_fp8_gemm_nt", results)
    assert "no peer ran" in report.table("summary", results)
    assert report.best_peer(row) is None


def test_arguments_by_name_take_their_place_and_the_rest_a_neutral_value():
    schema = torch._C.parse_schema("x::f(Tensor q, Tensor? k, float scale, int n, bool causal, int m=3) -> Tensor")
    q = torch.ones(1)
    assert peers.by_name(schema, q=q, n=7) == [q, None, 0.0, 7, False, 3]
    with pytest.raises(peers.Absent, match="has no argument page_table"):
        peers.by_name(schema, q=q, page_table=q)


FA3_FWD = """f::fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? q_v, Tensor? cu_seqlens_q, Tensor? seqused_k,
    int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, float softmax_scale, bool is_causal, int window_size_left,
    int window_size_right, float softcap, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin,
    int cp_world_size, int cp_rank) -> Tensor[]"""
FA3_SCHEDULE = """f::s(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, int num_heads_k, int headdim,
    int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q, int? page_size, int max_seqlen_k_new,
    bool is_causal, int window_size_left, int window_size_right, bool has_softcap, int num_splits) -> Tensor"""
FLASH_MLA = """f::m(Tensor q, Tensor kcache, int head_size_v, Tensor seqlens_k, Tensor block_table, float softmax_scale,
    bool is_causal, Tensor? tile_scheduler_metadata, Tensor? num_splits, Tensor? out_) -> Tensor[]"""


class FakeOp:
    """An op of a peer that decodes as the formula does, from arguments that its schema names."""

    def __init__(self, schema, decode):
        self.default = self
        self._schema = torch._C.parse_schema(" ".join(schema.split()))
        self.decode = decode
        self.calls = []

    def __call__(self, *arguments):
        given = dict(zip((x.name for x in self._schema.arguments), arguments, strict=True))
        self.calls.append(given)
        return self.decode(given)


def decoded(q, kv, table, seqlens, scale, causal):
    return deepseek_ops.mla_decode(q, kv, table, seqlens, softmax_scale=scale, causal=causal)[0]


def fa3_forward(x):
    b = x["seqused_k"].shape[0]
    q = torch.cat([x["q_v"], x["q"]], -1).unflatten(0, (b, x["max_seqlen_q"]))
    kv = torch.cat([x["v"], x["k"]], -1).squeeze(2)
    assert x["cp_world_size"] == 1
    assert x["scheduler_metadata"].item() == 7
    return [decoded(q, kv, x["page_table"], x["seqused_k"], x["softmax_scale"], x["is_causal"]).flatten(0, 1)]


def flash_mla_forward(x):
    out = decoded(x["q"], x["kcache"].squeeze(2), x["block_table"], x["seqlens_k"], x["softmax_scale"], x["is_causal"])
    return [out, torch.zeros(1), torch.full((1,), 7), torch.full((1,), 8)]


@pytest.mark.parametrize("shape", [x for x in shapes.MLA_STAND_INS if x.cache == "bf16"], ids=str)
def test_the_mla_peers_get_what_their_schemas_name_and_metadata_made_beforehand(monkeypatch, shape):
    from benchmarks import bench_mla

    ops = {
        "fwd": FakeOp(FA3_FWD, fa3_forward),
        "get_scheduler_metadata": FakeOp(FA3_SCHEDULE, lambda x: torch.tensor(7)),
        "dense_decode_fwd": FakeOp(FLASH_MLA, flash_mla_forward),
    }
    monkeypatch.setattr(peers, "_load_op", lambda library, namespace, name: ops[name])
    inputs = bench_mla.inputs(shape, 0)
    for prepare in bench_mla.rivals(shape).values():
        assert bench_mla.error(inputs, prepare(*inputs)()) < bench_mla.MLA_LIMIT
    [scheduled] = ops["get_scheduler_metadata"].calls
    assert (scheduled["headdim"], scheduled["headdim_v"], scheduled["num_heads_k"]) == (64, 512, 1)
    assert scheduled["max_seqlen_k"] >= shape.s_k
    first, timed = ops["dense_decode_fwd"].calls
    assert first["tile_scheduler_metadata"] is first["num_splits"] is None
    assert (timed["tile_scheduler_metadata"].item(), timed["num_splits"].item()) == (7, 8)


# ------------------------------------------------------------------------------------------------ decode steps


def test_an_op_needs_the_experts_that_were_chosen_and_the_tokens_that_are_cached():
    a, sfa, b, sfb = quantized_operands(4, 256, 128, "cpu")
    weights, scales = torch.stack([b] * 5), torch.stack([sfb] * 5)
    q, cache = torch.randn(2, 1, 3, 576).bfloat16(), torch.randn(9, 64, 576).bfloat16()
    table, lengths = torch.zeros(2, 4, dtype=torch.int32), torch.tensor([7, 200], dtype=torch.int32)
    offsets, token, table_of_tokens = torch.tensor([0, 0, 3, 3, 4, 4]).int(), torch.tensor([1]), torch.randn(1000, 64)
    with decode.Ledger() as ledger:
        deepseek_ops.m_grouped_fp8_gemm_nt_offsets(a, sfa, weights, scales, offsets)
        deepseek_ops.mla_decode(q, cache, table, lengths, softmax_scale=0.1)
        torch.nn.functional.embedding(token, table_of_tokens)
    experts, attention, embedding = ledger.work.values()
    assert list(ledger.work) == ["m_grouped_fp8_gemm_nt_offsets 5 x 256 x 128", "mla_decode", "embedding"]
    chosen = 2 * (b.nbytes + sfb.nbytes)
    assert experts.num_bytes == a.nbytes + sfa.nbytes + chosen + 4 * 6 + 2 * 4 * 256
    assert experts.flops == 2 * 4 * 256 * 128
    assert experts.multiplied == torch.float8_e4m3fn
    out_and_lse = 2 * 3 * (512 * 2 + 4)
    assert attention.num_bytes == 207 * 1152 + q.nbytes + table.nbytes + lengths.nbytes + out_and_lse
    assert attention.flops == 2 * 207 * 3 * (576 + 512)
    assert embedding.num_bytes == 8 + 4 * 64


def test_experts_in_bfloat16_need_the_weights_of_those_that_were_chosen():
    a, b = torch.randn(4, 128).bfloat16(), torch.randn(5, 256, 128).bfloat16()
    offsets = torch.tensor([0, 0, 3, 3, 4, 4]).int()
    with decode.Ledger() as ledger:
        deepseek_ops.m_grouped_bf16_gemm_nt_offsets(a, b, offsets)
        torch.nn.functional.grouped_mm(a, b.mT, offs=offsets[1:])
    ours, torchs = ledger.work["m_grouped_bf16_gemm_nt_offsets 5 x 256 x 128"], ledger.work["_grouped_mm 5 x 256 x 128"]
    assert ours.num_bytes == a.nbytes + 2 * b[0].nbytes + offsets.nbytes + 2 * 4 * 256
    assert ours.flops == torchs.flops == 2 * 4 * 256 * 128
    assert ours.multiplied == torchs.multiplied == torch.bfloat16


def test_each_token_chooses_experts_and_only_the_chosen_ones_are_read():
    for x in shapes.LITE_EXPERTS:
        counts = x.counts()
        assert (len(counts), sum(counts)) == (64, 6 * x.tokens)
        assert max(counts) <= x.tokens
        num_chosen = sum(count > 0 for count in counts)
        assert x.num_bytes == 2 * (num_chosen * x.n * x.k + x.rows * (x.n + x.k))
    assert [x.rows for x in shapes.LITE_EXPERTS[::2]] == [6, 96, 384]
    for x in shapes.FP8_EXPERTS:
        chosen = [count for count in x.counts() if count > 0]
        assert sum(chosen) == x.rows
        assert x.num_bytes == sum(shapes.Gemm(m, x.n, x.k).num_bytes for m in chosen)


def test_where_all_have_the_same_taste_some_experts_get_several_times_as_many_rows():
    x = shapes.ChosenExperts(512, 1, 32, 136, 272)
    liked = dataclasses.replace(x, taste=0.5)
    assert max(x.counts()) < 2 * 16 < 4 * 16 < max(liked.counts())
    assert sum(x.counts()) == sum(liked.counts()) == 512


def test_views_and_empty_memory_are_no_ops():
    with decode.Ledger() as ledger:
        x = torch.empty(4, 6).view(2, 12).T[1:].unsqueeze(0)
        x.copy_(torch.ones_like(x))
    assert list(ledger.work) == ["ones_like", "copy_"]


def test_the_ops_of_a_step_take_time_and_add_up_to_its_calls():
    model = decode.random_model(tiny_config("v3"), gemm="fp8", device="cpu")
    step = decode.step_after(model, batch=2, context=70, num_steps=4)
    rows = decode.breakdown(step, Ceilings(10.0, 10.0, None), num_steps=2)
    calls = {row["op"]: row["calls"] for row in rows}
    assert (calls["mla_decode"], calls["moe_gate"], calls["argmax"]) == (4, 3, 1)
    times = [row["us"] for row in rows]
    assert times == sorted(times, reverse=True)
    assert all(row["us"] > 0 and row["floor_us"] > 0 for row in rows)


def test_random_weights_have_the_variance_that_keeps_signals_as_they_are():
    model = decode.random_model(tiny_config("v3"), gemm="fp8", device="cpu")
    projection = model.layers[1].self_attn.o_proj
    x = torch.randn(200, projection.in_features)
    assert projection(x.bfloat16()).float().std() == pytest.approx(1, abs=0.1)
    assert model.logits(torch.randn(50, 256).bfloat16()).std() == pytest.approx(3, abs=0.3)


# ------------------------------------------------------------------------------------------------------ report


def results_of(row=None):
    row = row or run_case(make_case(theirs=lambda x: lambda: x + x))
    return {
        "schema": 1,
        "conditions": bench.conditions("cpu"),
        "ceilings": {"copy_gbps": 10.0, "read_gbps": 9.0, "fp8_tflops": None},
        "cases": [row],
        "host": [{"call": "torch.add", "us": 2.5}],
        "generation": [{"model": "toy", "batch": 1, "tokens_per_second": 100.0}],
        "steps": [
            {
                "model": "toy",
                "batch": 1,
                "context": 70,
                "graph": True,
                "step_us": 100.0,
                "floor_us": 40.0,
                "ops": [
                    {"op": "mla_decode", "calls": 2, "us": 79.5, "floor_us": 39.75},
                    {"op": "rope", "calls": 2, "us": 0.5, "floor_us": 0.25},
                ],
            }
        ],
        "tests": {"passed": 3, "failed": 0, "errors": 0, "skipped": 1},
        "sanitizer": {"memcheck": {"status": "passed", "cases": 4, "findings": 0, "control": "found", "detail": ""}},
    }


def row_with(ratio, a_a=(1.0, 0.99, 1.01), correct=True):
    ours = {"median_us": 10.0, "iqr_us": 0.1, "n": 15, "tflops": 5.0, "gbps": 50.0, "share_of_floor": 0.5}
    theirs = {**ours, "ratio": list(ratio), "correct": correct, "error": 0.0}
    providers = {OURS: ours, "theirs": theirs}
    return {"op": "cast_to_fp8", "case": "8 x 4", "flops": 1e6, "bytes": 1e6, "a_a": list(a_a), "providers": providers}


DOCUMENT = "# Title\n\n<!-- figures:begin cast_to_fp8 -->\nold\n<!-- figures:end cast_to_fp8 -->\n\nrest\n"


@pytest.fixture
def project(tmp_path):
    (tmp_path / "README.md").write_text(DOCUMENT)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "all.md").write_text(
        "".join(f"<!-- figures:begin {name} -->\n<!-- figures:end {name} -->\n" for name in report.TABLES)
    )
    results = tmp_path / "benchmarks" / "results" / "h200.json"
    results.parent.mkdir(parents=True)
    return tmp_path, results


def test_check_fails_until_the_documents_show_the_results(project):
    root, path = project
    path.write_text(json.dumps(results_of()))
    assert report.main(["--check"], root) == 1
    assert (root / "README.md").read_text() == DOCUMENT, "--check must change nothing"
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0
    text = (root / "README.md").read_text()
    assert "| 8 x 4 |" in text
    assert text.startswith("# Title\n")
    assert text.endswith("\nrest\n")


def test_check_sees_a_number_that_was_edited_by_hand(project):
    root, path = project
    path.write_text(json.dumps(results_of(row_with((1.5, 1.4, 1.6)))))
    report.main([], root)
    readme = root / "README.md"
    readme.write_text(readme.read_text().replace("| 10.0 |", "| 9.0 |"))
    assert report.main(["--check"], root) == 1


def test_without_results_the_tables_say_that_nothing_was_measured(project):
    root, _ = project
    assert report.main(["--check"], root) == 1
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0
    assert "Not measured yet" in (root / "README.md").read_text()


def test_a_name_that_no_table_has_and_a_marker_without_an_end_are_errors():
    with pytest.raises(ValueError, match="no figures of the name nonsense"):
        report.render("<!-- figures:begin nonsense -->\n<!-- figures:end nonsense -->", None)
    with pytest.raises(ValueError, match="without its figures:end"):
        report.render("<!-- figures:begin summary -->\n", None)


@pytest.mark.parametrize(
    ("ratio", "a_a", "verdict"),
    [
        ((1.2, 1.1, 1.3), (1.0, 0.99, 1.01), "faster"),
        ((0.8, 0.7, 0.9), (1.0, 0.99, 1.01), "slower"),
        ((1.02, 1.005, 1.03), (1.0, 0.98, 1.02), "level"),  # within the noise
        ((1.2, 0.9, 1.5), (1.0, 0.99, 1.01), "level"),  # too wide an interval
    ],
)
def test_a_claim_needs_an_interval_clear_of_one_and_of_the_noise(ratio, a_a, verdict):
    assert report.verdict(row_with(ratio, a_a), ratio) == verdict


def test_conditions_name_device_sources_and_ceilings():
    text = report.table("conditions", results_of())
    assert f"torch {torch.__version__}" in text
    assert "csrc/ " in text
    assert "copy 10 GB/s, read 9 GB/s." in text


def test_losing_cases_are_marked_and_wrong_peers_do_not_count():
    slower = results_of(row_with((0.8, 0.7, 0.9)))
    assert "**0.80 [0.70, 0.90] slower**" in report.table("cast_to_fp8", slower)
    assert "1 of 1" in report.table("summary", slower)
    wrong = results_of(row_with((0.8, 0.7, 0.9), correct=False))
    assert "its result is wrong" in report.table("cast_to_fp8", wrong)
    assert "no peer ran" in report.table("summary", wrong)


def test_results_of_another_schema_are_refused(tmp_path):
    path = tmp_path / "h200.json"
    path.write_text('{"schema": 2}')
    with pytest.raises(ValueError, match="schema 2, wanted 1"):
        report.load(path)


def test_plots_are_drawn_and_the_same_twice(tmp_path):
    pytest.importorskip("matplotlib")
    mla = row_with((1.2, 1.1, 1.3)) | {"op": "mla_decode", "case": "16 x 1 x 1024, 16 heads, bf16"}
    results = results_of()
    results["cases"].append(mla)
    first, second = (report.draw(results, tmp_path / name) for name in ("first", "second"))
    assert [path.name for path in first] == ["roofline.svg", "mla_latency.svg"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert "1024 tokens" in first[1].read_text()


def gemm_row(m, weight="512 x 256", ratio=(1.2, 1.1, 1.3), **providers):
    row = row_with(ratio) | {"op": "fp8_gemm_nt", "case": f"{m} x {weight}"}
    return {**row, "providers": {**row["providers"], **providers}}


def test_the_price_of_batch_invariance_has_a_table_only_where_it_was_measured():
    text = "a\n<!-- figures:begin batch_invariant -->\nold\n<!-- figures:end batch_invariant -->\nb\n"
    unmeasured = results_of() | {"cases": [gemm_row(1)]}
    empty = "a\n<!-- figures:begin batch_invariant -->\n<!-- figures:end batch_invariant -->\nb\n"
    assert report.render(text, unmeasured) == empty
    variant = {"median_us": 15.0, "ratio": [1.5, 1.4, 1.6], "correct": True}
    measured = results_of() | {"cases": [gemm_row(1, batch_invariant=variant), gemm_row(8192)]}
    filled = report.render(empty, measured)
    assert "takes 1.50 times as long" in filled
    assert "| 1 x 512 x 256 | 10.0 | 15.0 | 1.50 [1.40, 1.60] | 1.000 |" in filled
    assert "| 8192" not in filled
    assert report.render(filled, measured) == filled


def test_a_variant_of_ours_is_no_peer():
    fast = {"median_us": 5.0, "ratio": [0.5, 0.5, 0.5], "correct": True}
    row = gemm_row(1, batch_invariant=fast)
    assert report.best_peer(row) == [1.2, 1.1, 1.3]
    assert "batch_invariant" not in report.table("fp8_gemm_nt", results_of(row))


def test_the_gemms_plots_have_a_line_for_each_weight_and_for_each_peer_that_is_right(tmp_path):
    pytest.importorskip("matplotlib")
    wrong = {"ratio": [2.0, 2.0, 2.0], "correct": False}
    rows = [gemm_row(m, weight, wrong_one=wrong) for m in (1, 8, 64) for weight in ("512 x 256", "264 x 128")]
    results = results_of() | {"cases": [*rows, gemm_row(4, "999 x 128")]}
    drawn = {path.stem: path.read_text() for path in report.draw(results, tmp_path)}
    assert set(drawn) == {"roofline", "fp8_gemm_floor", "fp8_gemm_peers"}
    assert "512 x 256" in drawn["fp8_gemm_floor"]
    assert "999 x 128" not in drawn["fp8_gemm_floor"], "one point makes no line"
    assert "theirs" in drawn["fp8_gemm_peers"]
    assert "wrong_one" not in drawn["fp8_gemm_peers"]


def test_the_committed_documents_show_the_committed_results():
    assert report.main(["--check"]) == 0, "run: python benchmarks/report.py"


# --------------------------------------------------------------------------------------------------- GPU suite


def fake_stages(work, statuses, cases=True):
    """Stands in for run_stage: leaves behind what the stages would."""

    def run(stage, _):
        if stage.name == "tests":
            xml = '<testsuites><testsuite tests="5" failures="1" errors="0" skipped="1"/></testsuites>'
            (work / "tests.xml").write_text(xml)
        if stage.name == "benches" and cases:
            (work / "benches.json").write_text(json.dumps(results_of()))
        if stage.name == "sanitizer":
            (work / "sanitizer.json").write_text(json.dumps(results_of()["sanitizer"]))
        return Outcome(statuses.get(stage.name, "passed"), 1.0, "" if stage.name not in statuses else "why")

    return run


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ({}, 0),
        ({"tests": "failed"}, 1),
        ({"sanitizer": "timed out"}, 1),
        ({"benches": "timed out"}, 0),  # what was measured until then is kept
    ],
)
def test_the_suite_records_every_stage_and_fails_with_the_checks(tmp_path, capsys, statuses, code):
    run = fake_stages(tmp_path, statuses)
    assert gpu_suite.main([], gpu="NVIDIA H200", run=run, work=tmp_path, target=tmp_path / "results") == code
    results = json.loads((tmp_path / "results" / "h200.json").read_text())
    assert {name: stage["status"] for name, stage in results["stages"].items()} == {
        name: statuses.get(name, "passed") for name in ("tests", "sanitizer", "benches")
    }
    assert results["tests"] == {"passed": 3, "failed": 1, "errors": 0, "skipped": 1}
    assert results["sanitizer"]["memcheck"]["findings"] == 0
    assert "8 x 4" in capsys.readouterr().out


def test_a_suite_without_figures_fails_and_does_not_show_those_of_last_time(tmp_path):
    (tmp_path / "benches.json").write_text(json.dumps(results_of()))
    run = fake_stages(tmp_path, {}, cases=False)
    assert gpu_suite.main([], gpu="NVIDIA H200", run=run, work=tmp_path, target=tmp_path) == 1
    assert json.loads((tmp_path / "h200.json").read_text())["cases"] == []


def test_the_results_go_where_they_are_wanted(tmp_path):
    output = tmp_path / "elsewhere"
    run = fake_stages(tmp_path, {})
    assert gpu_suite.main(["--output", str(output)], gpu="NVIDIA H100 80GB HBM3", run=run, work=tmp_path) == 0
    assert [path.name for path in output.iterdir()] == ["h100.json"]


def test_a_suite_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "find_gpu", lambda: None)
    assert gpu_suite.main([]) == 2
    assert "no GPU here" in capsys.readouterr().err


def test_all_stages_together_stay_under_fifteen_minutes(tmp_path):
    for quick in (False, True):
        stages = gpu_suite.stages(tmp_path, quick=quick, peers=tmp_path)
        assert sum(stage.seconds for stage in stages) < 15 * 60
        assert ("--quick" in stages[-1].command) == quick
        assert str(tmp_path) in stages[-1].command


def test_the_benches_end_by_themselves_before_their_stage_is_ended():
    benches = gpu_suite.stages(seconds=50)[-1]
    assert benches.command[benches.command.index("--seconds") + 1] == "50"
    assert benches.seconds > 50


def test_some_stages_and_some_benches_run_alone(tmp_path):
    ran = []

    def run(stage, work):
        ran.append(stage)
        return fake_stages(tmp_path, {})(stage, work)

    wanted = ["--stages", "benches", "--bench", "gemm,grouped_gemm", "--cases", "64 x"]
    assert gpu_suite.main(wanted, gpu="NVIDIA H200", run=run, work=tmp_path, target=tmp_path / "results") == 0
    [benches] = ran
    files = [x for x in benches.command if x.endswith(".py")]
    assert files == ["benchmarks/bench_gemm.py", "benchmarks/bench_grouped_gemm.py"]
    assert all((report.ROOT / file).is_file() for file in files)
    assert benches.command[benches.command.index("--cases") + 1] == "64 x"


@pytest.mark.parametrize("wrong", [["--stages", "bench"], ["--bench", "gemm,mle"]])
def test_a_stage_or_a_family_that_is_not_there_is_refused_with_those_that_are(capsys, wrong):
    with pytest.raises(SystemExit):
        gpu_suite.main(wrong, gpu="NVIDIA H200")
    assert wrong[1].rpartition(",")[2] + ": there are " in capsys.readouterr().err


def run_of(cases, missing=(), csrc="a", **more):
    """Results of one run: `cases` name -> microseconds, `missing` name -> why."""
    conditions = {"csrc_sha256": csrc, "device": "NVIDIA H200", "date": f"at {csrc}"}
    return {
        "schema": 1,
        "conditions": conditions,
        "ceilings": {"copy_gbps": 1.0},
        "cases": [{"op": "x", "case": name, "us": us} for name, us in dict(cases).items()],
        "missing": [{"op": "x", "case": name, "why": why} for name, why in dict(missing).items()],
        "host": [],
        "generation": [],
        "stages": {"benches": {"status": "passed"}},
        "tests": {},
        "sanitizer": {},
        **more,
    }


def figures(results):
    return {row["case"]: row["us"] for row in results["cases"]}


def test_runs_of_the_same_sources_add_up_and_the_last_figure_of_a_case_counts():
    both = gpu_suite.merge(run_of({"a": 1, "b": 2}, tests={"passed": 3}), run_of({"b": 4, "c": 5}))
    assert figures(both) == {"a": 1, "b": 4, "c": 5}
    assert both["tests"] == {"passed": 3}


@pytest.mark.parametrize("key", gpu_suite.SAME)
def test_runs_of_other_sources_or_on_another_machine_never_mix(key):
    old, new = run_of({"a": 1}, tests={"passed": 3}), run_of({"b": 2})
    old["conditions"][key] = "something else"
    assert gpu_suite.merge(old, new) == new


def test_a_case_without_time_keeps_its_figures_and_one_that_fails_loses_them():
    why = {"a": report.OUT_OF_TIME, "b": "AssertionError: error 1", "c": report.OUT_OF_TIME}
    both = gpu_suite.merge(run_of({"a": 1, "b": 2}), run_of({}, why))
    assert figures(both) == {"a": 1}
    assert [x["case"] for x in both["missing"]] == ["b", "c"]
    assert gpu_suite.merge(both, run_of({"b": 3, "c": 4}))["missing"] == []


def test_a_run_without_benches_leaves_the_benches_conditions():
    tests = run_of({}, tests={"passed": 1}, stages={"tests": {"status": "passed"}})
    del tests["ceilings"]
    tests["conditions"]["date"] = "later"
    both = gpu_suite.merge(run_of({"a": 1}), tests)
    assert both["conditions"]["date"] == "at a"
    assert both["tests"] == {"passed": 1}
    assert set(both["stages"]) == {"tests", "benches"}


def test_two_runs_make_one_file_and_a_change_of_the_sources_starts_it_anew(tmp_path, monkeypatch):
    def suite(stages, csrc):
        found = {**bench.conditions("cpu"), "csrc_sha256": csrc}
        monkeypatch.setattr(gpu_suite, "find_conditions", lambda: found)
        argv = ["--stages", stages]
        gpu_suite.main(argv, gpu="NVIDIA H200", run=fake_stages(tmp_path, {}), work=tmp_path, target=tmp_path)
        return json.loads((tmp_path / "h200.json").read_text())

    now = bench.revision()["csrc_sha256"]
    assert len(suite("benches", now)["cases"]) == 1
    both = suite("tests,sanitizer", now)
    assert len(both["cases"]) == 1
    assert both["tests"]["passed"] == 3
    assert suite("tests", "other")["cases"] == []


def test_ops_that_a_run_lacks_are_shown_from_the_run_of_older_sources_and_say_so(tmp_path):
    new, before = results_of(), results_of()
    other = {**before["cases"][0], "op": "rope"}
    before["cases"] = [{**before["cases"][0], "case": "of old"}, other]
    before["missing"] = [{"op": "rope", "case": "of old, too long", "why": report.OUT_OF_TIME}]
    before["host"] = [{"call": "rope", "us": 3.0}]
    new["generation"] = new["steps"] = []
    before["conditions"] = {**before["conditions"], "csrc_sha256": "0123456789abcdef"}
    (tmp_path / "h200.json").write_text(json.dumps(new))
    assert report.load_with_earlier(tmp_path / "h200.json") == new
    (tmp_path / "h200-before.json").write_text(json.dumps(before))
    both = report.load_with_earlier(tmp_path / "h200.json")
    assert [x["case"] for x in both["cases"]] == ["8 x 4", "8 x 4"]
    assert "older csrc/" not in report.table("cast_to_fp8", both)
    assert "Measured with older csrc/ 0123456789ab.\n\nNot measured: of old, too long." in report.table("rope", both)
    assert "| `rope`, older csrc/ 0123456789ab | 1 |" in report.table("summary", both)
    for kind in ("generation", "steps"):
        assert len(both[kind]) == len(before[kind]) > 0
        assert "Measured with older csrc/ 0123456789ab." in report.table(kind, both)


def test_cases_from_several_runs_are_said_to_be():
    results = results_of()
    results["cases"] = [{**results["cases"][0], "date": date} for date in ("1999-01-01", "1999-01-02")]
    assert "The cases come from 2 runs, the first of 1999-01-01." in report.table("conditions", results)


def test_missing_cases_are_named_below_their_table():
    results = results_of(row_with((1.2, 1.1, 1.3)))
    results["missing"] = [{"op": "cast_to_fp8", "case": "9 x 4", "why": report.OUT_OF_TIME}]
    assert report.table("cast_to_fp8", results).endswith("\n\nNot measured: 9 x 4.")


def test_the_seconds_of_a_run_are_summed_by_op_and_part():
    results = results_of()
    assert results["cases"][0]["seconds"].keys() == {"inputs", "prepare", "measure", "verify"}
    results["cases"] = [{"op": "x", "seconds": {"inputs": 1.0, "measure": 2.0}}] * 2
    line = report.seconds_table(results)
    assert "2 cases     6.0 s: inputs 2.0, measure 4.0" in line


def test_a_stage_passes_fails_or_is_ended_with_what_it_started(tmp_path):
    def stage(code, seconds=60.0):
        return gpu_suite.run_stage(Stage("s", (sys.executable, "-c", code), seconds), tmp_path)

    assert stage("print('fine')").status == "passed"
    failed = stage("print('why'); raise SystemExit(3)")
    assert (failed.status, failed.detail) == ("failed", "why")
    pid = tmp_path / "pid"
    child = f"""
import subprocess
sleep = subprocess.Popen(["sleep", "60"])
open({str(pid)!r}, "w").write(str(sleep.pid))
sleep.wait()
"""
    ended = stage(child, 3.0)
    assert ended.status == "timed out"
    assert ended.seconds < 20
    assert is_gone(int(pid.read_text())), "what the stage started lives on"


def is_gone(pid):
    """Whether a process has ended (a zombie that nobody waits for counts as ended), waiting a little."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("gpu", "name"), [("NVIDIA H200", "h200.json"), ("NVIDIA H100 80GB HBM3", "h100.json"), ("Odd One", "odd-one.json")]
)
def test_the_results_file_is_named_after_the_gpu(gpu, name):
    assert gpu_suite.results_name(gpu) == name


# --------------------------------------------------------------------------------------- plans of MLA decoding


def legal_plans(shape, num_sms):
    """In the planner's order."""
    every = ((size, parts, rows) for rows in (16, 64) for size in (1, 2, 4, 8) for parts in range(1, num_sms + 1))
    return [plan for plan in every if sweep_mla_plans.is_legal(shape, plan, num_sms)]


def test_the_sweep_of_mla_plans_covers_what_the_benchmarks_measure():
    swept = sweep_mla_plans.SHAPES
    assert len(set(swept)) == len(swept)
    measured = {*shapes.MLA, *shapes.MLA_BETWEEN, *shapes.MLA_ONE_SCALE, *shapes.MLA_FP8}
    assert {*shapes.MLA, *shapes.MLA_ONE_SCALE} < {*swept} < measured
    assert all(sweep_mla_plans.shape_of(sweep_mla_plans.name_of(shape)) == shape for shape in swept)


@pytest.mark.parametrize("num_sms", [78, 132])
def test_the_mla_plans_that_are_timed_are_legal_and_few(num_sms):
    for shape in sweep_mla_plans.SHAPES:
        plans = sweep_mla_plans.plans(shape, num_sms)
        assert len(set(plans)) == len(plans) >= 1
        assert {*plans} <= {*legal_plans(shape, num_sms)}
        assert all(sum(plan[-1] == rows for plan in plans) <= 28 for rows in (16, 64))
    latency = sweep_mla_plans.plans(shapes.Mla(1, 1, 65536, 16), 132)
    assert {(1, 132, 16), (2, 66, 16), (4, 33, 16), (8, 8, 16), (8, 15, 16), (8, 16, 64)} < {*latency}
    assert (1, 1, 16) not in latency, "one SM for all keys"


@pytest.fixture(scope="module")
def mla_model():
    try:
        return sweep_mla_plans.Model()
    except RuntimeError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("num_sms", [78, 132])
def test_the_model_that_is_fitted_chooses_as_the_planner_does(mla_model, num_sms):
    swept = [x for x in (*sweep_mla_plans.SHAPES, shapes.Mla(7, 3, 1000, 40, "fp8")) if x.s_k > 256]
    for shape in swept:
        plans = legal_plans(shape, num_sms)
        times = mla_model.estimate(mla_model.cases(shape, plans, num_sms), mla_model.constants())
        assert (times > 0).all()
        assert plans[times.argmin()] == mla_model.choose(shape, num_sms), shape


def swept_by_model(model, constants):
    """A sweep in which every plan takes as long as the model says."""
    content = {"num_sms": 132, "shapes": {}}
    for shape in sweep_mla_plans.SHAPES[::2]:
        chosen = model.choose(shape, 132)
        plans = dict.fromkeys([chosen, *sweep_mla_plans.plans(shape, 132)])
        times = model.estimate(model.cases(shape, plans, 132), constants)
        names = ["/".join(map(str, plan)) for plan in plans]
        row = {"chosen": names[0], "us": dict(zip(names, times.tolist(), strict=True))}
        content["shapes"][sweep_mla_plans.name_of(shape)] = row
    return content


def test_a_fit_to_the_planners_own_estimates_has_nothing_to_gain(mla_model):
    fit = sweep_mla_plans.Fit(mla_model, [swept_by_model(mla_model, mla_model.constants())])
    assert fit.loss(mla_model.constants()) == pytest.approx(0, abs=1e-12)
    assert (fit.search(50) == mla_model.constants()).all()


def test_a_fit_finds_the_constants_behind_the_times(mla_model, tmp_path, monkeypatch, capsys):
    num_kernels = len(sweep_mla_plans.as_source(mla_model.constants()).splitlines())
    truth = mla_model.constants().reshape(num_kernels, -1)
    truth[:, :4] *= [1.2, 0.9, 1.1, 0.8]  # a CTA's start, tiles, memory
    sweep = swept_by_model(mla_model, truth.flatten())
    fit = sweep_mla_plans.Fit(mla_model, [sweep])
    assert fit.error(mla_model.constants()) > 0.05
    found = fit.search(10_000)
    assert fit.error(found) < 0.01
    assert fit.regrets(found).mean() < 1e-3
    # Others make up for each other, or never are what bounds the time.
    assert found.reshape(num_kernels, -1)[:, 0] == pytest.approx(truth[:, 0], rel=0.1)

    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(sweep))
    monkeypatch.setattr(sweep_mla_plans.Fit, "search", lambda self: found)
    assert sweep_mla_plans.main(["--fit", str(path)]) == 0
    out = capsys.readouterr().out
    assert "fitted:   51 shapes: mean regret 0.0" in out
    assert out.endswith(sweep_mla_plans.as_source(found) + "\n")


def test_fitted_constants_are_printed_as_the_planner_has_them(mla_model):
    rows = sweep_mla_plans.as_source(mla_model.constants())
    assert all("{kMlaFewRowsTile, " in row or "{kMlaManyRowsTile, " in row for row in rows.splitlines())
    numbers = [float(x) for row in rows.splitlines() for x in re.findall(r"[\d.][\de.]*(?=[,}])", row)]
    assert numbers == mla_model.constants().tolist()
    literals = [sweep_mla_plans.literal(x) for x in (4.96, 0.546, 0.0, 6e-5, 2.0, 999.7, 78_812.0, 4.38e6)]
    assert literals == ["4.96", ".546", "0.", ".0001", "2.", "1000.", "78.8e3", "4.38e6"]


def test_a_sweep_says_what_the_planners_choice_costs_and_stops_in_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep_mla_plans, "run_plan", lambda call, plan: None)
    monkeypatch.setattr(sweep_mla_plans, "planned", lambda call: (4, 4, 16))
    monkeypatch.setattr(sweep_mla_plans, "num_sms", lambda: 132)
    monkeypatch.setattr(bench, "num_input_sets", lambda num_bytes: 2)
    row = sweep_mla_plans.sweep(shapes.Mla(1, 1, 2048, 16, "fp8"))
    assert row["chosen"] == next(iter(row["us"])) == "4/4/16"
    assert len(row["us"]) > 20
    assert row["absent"] == {}

    def sweep(shape):
        time.sleep(0.2)
        return {"chosen": "4/4/16", "us": {"4/4/16": 1.1, "8/4/16": 1.0}}

    monkeypatch.setattr(sweep_mla_plans, "sweep", sweep)
    path = tmp_path / "sweep.json"
    sweep_mla_plans.sweep_all([shapes.Mla(b, 1, 2048, 16) for b in (1, 2, 4, 8)], 0.5, path)
    content = json.loads(path.read_text())
    assert list(content["shapes"]) == ["1x1x2048x16:bf16", "2x1x2048x16:bf16"]
    assert content["num_sms"] == 132
    assert content["conditions"]["csrc_sha256"]
    out = capsys.readouterr().out
    assert "1x1x2048x16:bf16: chosen 4/4/16 1.1 us, best 8/4/16 1.0 us, regret 10.0%" in out
    assert "no time for 4x1x2048x16:bf16 8x1x2048x16:bf16" in out
    assert "2 shapes: mean regret 10.00%, worst 10.0%" in out


def test_a_sweep_of_mla_plans_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sweep_mla_plans, "GPU", False)
    assert sweep_mla_plans.main(["1x1x512x16:bf16"]) == 2
    assert "no GPU here; --fit FILE needs none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sweep_mla_plans.main(["1x1x512:bf16"])
    assert "a shape is BATCHxS_QxS_KxHEADS:{bf16,fp8,e4m3}" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- sanitizer


def fake_sanitizer(planted="ERROR SUMMARY: 3 errors", cases="7 cases ran\nERROR SUMMARY: 0 errors", code=0):
    def run(command):
        return (1, planted) if "plant" in command else (code, cases)

    return run


@pytest.mark.parametrize(
    ("run", "status", "control"),
    [
        (fake_sanitizer(), "passed", "found"),
        (fake_sanitizer(cases="7 cases ran\nERROR SUMMARY: 2 errors", code=1), "failed", "found"),
        (fake_sanitizer(planted="ERROR SUMMARY: 0 errors"), "failed", "missed"),
        (fake_sanitizer(cases="Traceback", code=1), "failed", "found"),
        (fake_sanitizer(cases="0 cases ran\nERROR SUMMARY: 0 errors"), "failed", "found"),
        (fake_sanitizer(cases="7 cases ran\nERROR SUMMARY: 0 errors", code=1), "failed", "found"),
        (fake_sanitizer("Device not supported", "Device not supported", 1), "unavailable", "not run"),
    ],
)
def test_a_tool_passes_only_if_it_is_silent_on_our_cases_and_not_on_its_bug(run, status, control):
    found = sanitizer.check("memcheck", run)
    assert (found["status"], found["control"]) == (status, control)


def test_racecheck_counts_hazards():
    assert sanitizer.num_findings("RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)") == 2
    assert sanitizer.num_findings("no summary") is None


def test_a_flag_that_a_version_does_not_know_is_left_out():
    def run(command):
        if any(flag in command for flag in sanitizer.TOOLS["memcheck"]):
            return 1, "unrecognised option"
        return fake_sanitizer()(command)

    assert sanitizer.check("memcheck", run)["status"] == "passed"


def test_every_tool_has_its_bug_and_one_failure_fails_all(tmp_path):
    assert set(sanitizer.PLANTED) == set(sanitizer.TOOLS)
    path = tmp_path / "found.json"
    assert sanitizer.main(["--json", str(path)], fake_sanitizer()) == 0
    assert set(json.loads(path.read_text())) == set(sanitizer.TOOLS)
    assert sanitizer.main([], fake_sanitizer(cases="7 cases ran\nERROR SUMMARY: 2 errors", code=1)) == 1


@pytest.mark.slow
def test_all_benches_run_once_on_this_machine():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
