"""How the ops live with CUDA: graphs, streams, threads, the allocator, and a machine with several GPUs."""

import subprocess
import sys
import threading

import pytest
import torch

import deepseek_ops as ops
from deepseek_ops.registry import OPS
from tests.samples import SAMPLES
from tests.support import bits, quantized_operands

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def tensors(result):
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


@pytest.mark.parametrize("name", OPS)
def test_cpu_and_cuda_agree(name):
    """Loosely, for every op at once; each family's own tests hold it to its gates."""
    args = SAMPLES[name]("cpu")
    on_gpu = tuple(x.cuda() if isinstance(x, torch.Tensor) else x for x in args)
    got, want = tensors(OPS[name](*on_gpu)), tensors(OPS[name](*args))
    written = [(x.cpu(), y) for x, y in zip(on_gpu, args, strict=True) if isinstance(x, torch.Tensor)]
    for x, y in [*((x.cpu(), y) for x, y in zip(got, want, strict=True)), *written]:
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        if x.is_floating_point():
            torch.testing.assert_close(x.double(), y.double(), rtol=0.13, atol=2e-2, equal_nan=True)
        elif x.dtype != torch.uint8:  # bytes of an FP8 cache
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", OPS)
def test_a_graph_replays_the_eager_bits(name):
    args = SAMPLES[name]("cuda")
    copies = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args)
    OPS[name](*tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args))  # allocator and caches are warm
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tensors(OPS[name](*args))
    for x in captured:
        x.untyped_storage().fill_(0xA5)
    graph.replay()
    eager = tensors(OPS[name](*copies))
    for x, y in zip(captured, eager, strict=True):
        assert torch.equal(bits(x), bits(y))
    for x, y in zip(args, copies, strict=True):
        if isinstance(x, torch.Tensor):
            assert torch.equal(bits(x), bits(y))


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "batch invariant"])
@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("cache", ["bf16", "fp8"])
@pytest.mark.parametrize("b", [3, 40])
def test_a_captured_decoding_is_right_for_the_lengths_of_each_replay(b, cache, ragged, batch_invariant):
    """1,000 replays over the sixteen kinds: lengths, pages and offsets change; the bits are those of an eager call."""
    s_q, h, max_pages, page_size = 3, 16, 40, 64
    generator = torch.Generator("cuda").manual_seed(b)
    randint = lambda *bounds_and_size: torch.randint(*bounds_and_size, device="cuda", generator=generator).int()
    kv_cache = torch.randn(b * max_pages, page_size, 576, device="cuda", generator=generator).bfloat16()
    if cache == "fp8":
        latents, sf = ops.per_token_cast_to_fp8(kv_cache[..., :512])
        parts = (latents, sf, kv_cache[..., 512:].contiguous())
        kv_cache = torch.cat([x.view(torch.uint8) for x in parts], -1)
    q = torch.randn(b, s_q, h, 576, device="cuda", generator=generator).bfloat16()
    q = q.flatten(0, 1) if ragged else q
    table, lengths = randint(0, 1, (b, max_pages)), randint(0, 1, (b,))
    offsets = randint(0, 1, (b + 1,)) if ragged else None

    def decode():
        options = {"softmax_scale": 1 / 24, "cu_seqlens_q": offsets, "batch_invariant": batch_invariant}
        return ops.mla_decode(q, kv_cache, table, lengths, **options)

    decode()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode()
    for _ in range(1000 // 16 + 1):
        table.copy_(randint(0, b * max_pages, (b, max_pages)))
        lengths.copy_(randint(0, max_pages * page_size + 1, (b,)))
        if offsets is not None:
            offsets[1:] = randint(0, s_q * b + 1, (b,)).sort().values
        for x in captured:
            x.untyped_storage().fill_(0xA5)
        graph.replay()
        for x, y in zip(captured, decode(), strict=True):
            assert torch.equal(bits(x), bits(y))


def test_capture_may_be_the_first_use_of_the_process():
    code = (
        "import torch, deepseek_ops as d\n"
        "x, w = torch.randn(70, 512, device='cuda').bfloat16(), torch.randn(136, 512, device='cuda')\n"
        "b, sfb = d.per_block_cast_to_fp8(w); torch.cuda.synchronize()\n"
        "graph = torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(graph): out = d.fp8_gemm_nt(*d.per_token_cast_to_fp8(x), b, sfb)\n"
        "graph.replay(); torch.testing.assert_close(out, d.fp8_gemm_nt(*d.per_token_cast_to_fp8(x), b, sfb))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_work_runs_on_torchs_current_stream():
    a, sfa, b, sfb = quantized_operands(64, 136, 512, "cuda")
    want = ops.fp8_gemm_nt(a, sfa, b, sfb)
    late = torch.zeros_like(a.view(torch.uint8))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # on any other stream the GEMM would run before the copy
        late.copy_(a.view(torch.uint8))
        got = ops.fp8_gemm_nt(late.view(torch.float8_e4m3fn), sfa, b, sfb)
    stream.synchronize()
    assert torch.equal(bits(got), bits(want))


def test_eight_threads_on_two_streams_give_the_serial_bits():
    shapes = [(1, 2112, 7168), (65, 576, 1024), (130, 264, 400), (300, 1024, 512)]
    cases = [quantized_operands(*shape, "cuda", seed=i) for i, shape in enumerate(shapes)]
    want = [ops.fp8_gemm_nt(*case) for case in cases]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    done = []

    def work(thread):
        with torch.cuda.stream(streams[thread % 2]):
            for i in range(500):
                case = (i + thread) % len(cases)
                got = ops.fp8_gemm_nt(*cases[case])
                if i % 50 == 0:
                    assert torch.equal(bits(got), bits(want[case])), (thread, i)
        done.append(thread)  # an exception ends a thread, and nobody else

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(8))


def test_a_thread_may_begin_with_a_gemm():
    """A new host thread has no CUDA context, which the encoder of TMA descriptors wants."""
    args = quantized_operands(64, 136, 512, "cuda")
    want, got = ops.fp8_gemm_nt(*args), []
    thread = threading.Thread(target=lambda: got.append(ops.fp8_gemm_nt(*args)))
    thread.start()
    thread.join()
    assert torch.equal(bits(got[0]), bits(want))


def test_outputs_come_from_torchs_allocator_and_nothing_else_is_allocated():
    a, sfa, b, sfb = quantized_operands(256, 512, 1024, "cuda")
    ops.fp8_gemm_nt(a, sfa, b, sfb)
    torch.cuda.synchronize()
    before, free_before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    out = ops.fp8_gemm_nt(a, sfa, b, sfb)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before == out.numel() * 2
    assert torch.cuda.mem_get_info()[0] == free_before


def test_a_call_does_not_wait_for_the_gpu():
    a, sfa, b, sfb = quantized_operands(64, 136, 512, "cuda")
    ops.fp8_gemm_nt(a, sfa, b, sfb)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(500_000_000)
    ops.fp8_gemm_nt(*ops.per_token_cast_to_fp8(torch.randn(64, 512, device="cuda")), b, sfb)
    done.record()
    assert not done.query(), "the call returned only after the GPU had finished"
    torch.cuda.synchronize()


def test_tensors_of_two_devices_are_refused():
    a, sfa, b, sfb = quantized_operands(4, 16, 128, "cuda")
    with pytest.raises(ValueError, match="fp8_gemm_nt: b must be on cuda:0 like a, got cpu"):
        ops.fp8_gemm_nt(a, sfa, b.cpu(), sfb)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_runs_on_the_device_of_its_tensors():
    args = quantized_operands(70, 136, 512, "cuda:1")
    with torch.cuda.device(0):
        got = ops.fp8_gemm_nt(*args)
        assert torch.cuda.current_device() == 0
    assert got.device == torch.device("cuda:1")
    assert torch.equal(got.cpu(), ops.fp8_gemm_nt(*(x.to("cuda:0") for x in args)).cpu())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_layer_gives_the_eager_bits(mode):
    b, sfb = ops.per_block_cast_to_fp8(torch.randn(136, 512, device="cuda"))

    def layer(x):
        return ops.fp8_gemm_nt(*ops.per_token_cast_to_fp8(x), b, sfb) * 2

    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for m in (64, 64, 65, 130):
        x = torch.randn(m, 512, device="cuda").bfloat16()
        assert torch.equal(bits(compiled(x)), bits(layer(x)))
