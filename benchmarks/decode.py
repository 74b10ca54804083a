"""Sparse decode against dense attention on a GPU.

    python benchmarks/decode.py [--quick] [--stages] [--sweep]

Checks every stack against the reference, then times CUDA-graph replays of it and of every SDPA backend in the same
run, and prints a table (ours, best dense, ratio, bytes moved, share of the measured copy ceiling) and one JSON line.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import itertools
import json
import pstats
import time
import warnings
from collections import defaultdict

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sah_transformers.attention import make_call, run
from sah_transformers.kernels.decode import decode, why_not
from sah_transformers.kernels.decode import kernel as engine
from sah_transformers.maskers import MaskerRegistry

H, G, D = 32, 8, 128
SINK, LOCAL = {"type": "sink", "sink_size": 128}, {"type": "local", "window_size": 128}
TOP_K = {"type": "oracle_top_k", "heavy_size": 0.05}
GROUP = {**TOP_K, "gqa": "group"}
TOP_P = {"type": "oracle_top_p", "top_p": 0.9}
CASES = [
    ("top-k 5 %", [SINK, LOCAL, TOP_K], 1, 131072, 1, 0.84),
    ("top-k 5 %", [SINK, LOCAL, TOP_K], 1, 65536, 1, None),
    ("top-k 5 %", [SINK, LOCAL, TOP_K], 1, 32768, 1, 1.07),
    ("top-k 5 %", [SINK, LOCAL, TOP_K], 1, 8192, 1, None),
    ("top-k 5 %", [SINK, LOCAL, TOP_K], 4, 131072, 1, 0.76),
    ("top-k 5 % per KV head", [SINK, LOCAL, GROUP], 1, 131072, 1, 0.80),
    ("top-p 0.9", [SINK, LOCAL, TOP_P], 1, 131072, 1, 1.25),
    ("top-p 0.9, q x 2", [SINK, LOCAL, TOP_P], 1, 131072, 2, 1.2),
    ("top-p 0.9, q x 3", [SINK, LOCAL, TOP_P], 1, 131072, 3, 0.9),
    ("sink + local", [SINK, LOCAL], 1, 131072, 1, 1 / 12),
    ("sink + local", [SINK, LOCAL], 1, 32768, 1, None),
]
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def tensors(batch, keys, scale=1.0, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

    return normal(batch, H, 1, D) * scale, normal(batch, G, keys, D), normal(batch, G, keys, D)


def call_of(stack, q, k, v, **options):
    """The call; ``run`` takes the reference for it."""
    options = {"kernel": "reference", **options}
    return make_call(q, k, v, [MaskerRegistry.create_masker(config) for config in stack], **options)


def graph_ms(function, repeats=20, calls=10):
    """(p20, p50, p80) in ms of one of ``calls`` CUDA-graph replays in a row, so that launching is not what is timed."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        function()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    for _ in range(5):
        graph.replay()
    for i in range(repeats):
        events[2 * i].record()
        for _ in range(calls):
            graph.replay()
        events[2 * i + 1].record()
    torch.cuda.synchronize()
    times = sorted(events[2 * i].elapsed_time(events[2 * i + 1]) / calls for i in range(repeats))
    return times[repeats // 5], times[repeats // 2], times[repeats * 4 // 5]


def dense_ms(q, k, v):
    """Replay time in ms of each backend that takes the case."""
    result = {}
    for name, backend in BACKENDS.items():
        try:
            with warnings.catch_warnings(action="ignore"), sdpa_kernel(backend):
                result[name] = graph_ms(lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True))
        except RuntimeError:
            torch.cuda.synchronize()
    result["any"] = graph_ms(lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True))
    return result


def copy_rate():
    """Bytes per second of a device-to-device copy, read and written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_ms(lambda: target.copy_(source), 10)[1] * 1e3


def check(name, stack, batch, keys, scale):
    """Selection in float32 with nearly uniform weights, where one wrong key shows; then the output in bfloat16."""
    if batch * keys <= 131072:
        q, k, v = tensors(batch, keys, 1e-2 * scale, torch.float32, seed=1)
        if stack[-1]["type"] == "oracle_top_p":
            q = q / 1e-2
        call = call_of(stack, q, k, v)
        error = (decode(call) - run(call)[0]).abs().max().item()
        limit = 1e-3 if stack[-1]["type"] == "oracle_top_p" else 2e-5  # one key at the edge of top_p may differ
        assert error < limit, f"{name}: selection differs, error {error}"
    q, k, v = tensors(batch, keys, scale, seed=2)
    call = call_of(stack, q, k, v)
    out = decode(call)
    assert torch.equal(out, decode(call)), f"{name}: two runs differ"
    truth = (
        run(call)[0]
        if batch == 1
        else torch.cat([run(call_of(stack, q[i : i + 1], k[i : i + 1], v[i : i + 1]))[0] for i in range(batch)])
    )
    error = (out.double() - truth.double()).norm() / truth.double().norm()
    assert error < 1e-2, f"{name}: error {error}"
    return error.item()


def bytes_moved(name, stack, batch, keys, kept):
    head = 2 * D * batch * G * keys
    if len(stack) == 2:
        return 2 * 2 * D * batch * G * 256
    rows = batch * (G if "per KV" in name else H)
    values = min(head, int(2 * D * rows * kept))
    return head + values + 2 * 4 * batch * H * keys


def stage_us(function, repeats=10):
    """Mean microseconds of each kernel of a call."""
    function()
    with (
        warnings.catch_warnings(action="ignore"),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile,
    ):
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    times = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name].append(event.device_time)
    return {name: round(sorted(t)[len(t) // 2], 1) for name, t in times.items() if "kernel" in name}


def host_us(call, repeats=200):
    for _ in range(10):
        decode(call)
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        decode(call)
        times.append(time.perf_counter() - start)
        if len(times) % 20 == 0:
            torch.cuda.synchronize()
    return sorted(times)[repeats // 2] * 1e6


def tuned(call, **changes):
    """``call`` as a function, under other launch parameters."""
    original = engine.tuning_of

    def function():
        engine.tuning_of = lambda *a: dataclasses.replace(original(*a), **changes)
        try:
            return decode(call)
        finally:
            engine.tuning_of = original

    engine.PLANS.clear()
    return function


def grid(**choices):
    """Every combination of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


SWEEPS = [
    ("group", [SINK, LOCAL, GROUP], 131072, grid(chunk=[512, 1024], gather_warps=[2, 4], gather_programs=[512, 1024])),
    ("top-p", [SINK, LOCAL, TOP_P], 131072, grid(histogram_chunk=[512, 2048])),
    ("top-k", [SINK, LOCAL, TOP_K], 32768, grid(gather_warps=[1, 2], chunk=[256, 512])),
]  # fmt: skip


def sweep():
    for name, stack, keys, variants in SWEEPS:
        call = call_of(stack, *tensors(1, keys))
        for changes in variants:
            try:
                times = stage_us(tuned(call, **changes))
                line = " ".join(f"{kernel.removesuffix('_kernel')} {time}" for kernel, time in times.items())
                print(f"{name} {keys} {changes}: {line}", flush=True)
            except Exception as error:
                print(name, keys, changes, repr(error)[:200])
    engine.PLANS.clear()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the first case only")
    parser.add_argument("--stages", action="store_true", help="time of each kernel")
    parser.add_argument("--host", action="store_true", help="where the host's time goes")
    parser.add_argument("--sweep", action="store_true", help="launch parameters of the top-k stages")
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many of the cases")
    arguments = parser.parse_args()
    rate = copy_rate()
    results = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {rate / 1e12:.2f} TB/s")
    print(
        f"{'case':24} {'B':>2} {'keys':>7} {'ours':>8} {'dense':>8} {'ratio':>6} {'target':>6} {'MB':>6} {'of copy':>7}"
    )
    for name, stack, batch, keys, scale, target in CASES[:1] if arguments.quick else CASES[: arguments.cases]:
        try:
            error = check(name, stack, batch, keys, scale)
        except Exception as failure:
            print(f"{name} {batch} {keys}: FAILED {failure!r}"[:400], flush=True)
            continue
        q, k, v = tensors(batch, keys, scale)
        call = call_of(stack, q, k, v)
        assert not why_not(call)
        ours = graph_ms(lambda call=call: decode(call))
        dense = dense_ms(q, k, v)
        best = min(dense, key=lambda n: dense[n][1])
        kept = 0.6 * keys if "0.9" in name and scale == 1 else 0.05 * keys + 256
        moved = bytes_moved(name, stack, batch, keys, kept)
        ratio = ours[1] / dense[best][1]
        share = moved / ours[1] * 1e3 / rate
        print(
            f"{name:24} {batch:2} {keys:7} {ours[1]:8.4f} {dense[best][1]:8.4f} {ratio:6.3f} {target or 0:6.2f} "
            f"{moved / 1e6:6.0f} {share:7.2f}  {best} err {error:.1e}",
            flush=True,
        )
        if arguments.stages:
            print("   ", stage_us(lambda call=call: decode(call)), flush=True)
        results.append(
            {
                "case": name,
                "B": batch,
                "K": keys,
                "q": scale,
                "ms": ours,
                "dense_ms": dense,
                "ratio": ratio,
                "target": target,
            }
        )
        del q, k, v, call
        torch.cuda.empty_cache()
    call = call_of([SINK, LOCAL, TOP_K], *tensors(1, 131072))
    host = host_us(call)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    decode(call)
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    print(f"host time of a call {host:.0f} us, extra memory at 131072 {extra:.1f} MiB")
    if arguments.host:
        with cProfile.Profile() as profile:
            for _ in range(100):
                decode(call)
        pstats.Stats(profile).sort_stats("tottime").print_stats(18)
    if arguments.sweep:
        sweep()
    import triton

    print(json.dumps({
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "copy_tb_s": rate / 1e12, "host_us": host, "extra_mib": extra, "cases": results,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
