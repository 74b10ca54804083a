"""Prefill on a GPU: `python -m benchmarks.prefill [lengths]`, exact sparse stacks against dense SDPA.

Before anything is timed every case is checked: on a small shape against the reference, and at the timed shape every
row's number of keys against its budget and the output of some rows against float64. A failed check ends the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sah_transformers.attention import Call, make_call, run
from sah_transformers.budget import resolve_budget
from sah_transformers.kernels.prefill import prefill, why_not
from sah_transformers.maskers import MaskerRegistry

SINK, LOCAL = {"type": "sink", "sink_size": 128}, {"type": "local", "window_size": 128}
STACKS = {
    "sink + local": [SINK, LOCAL],
    "sink + local + top-k 5 %": [SINK, LOCAL, {"type": "oracle_top_k", "heavy_size": 0.05}],
}
HEADS, GROUPS, DIM = 32, 8, 128


def call_of(maskers: list, length: int, heads: int = HEADS, groups: int = GROUPS, seed: int = 0) -> Call:
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = ((1, heads, length, DIM), (1, groups, length, DIM), (1, groups, length, DIM))
    tensors = [torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16) for s in shapes]
    return make_call(*tensors, [MaskerRegistry.create_masker(m) for m in maskers])


def expected_counts(maskers: list, length: int) -> torch.Tensor:
    """Keys of each row, ``[Q]``, from the budgets alone."""
    n = torch.arange(1, length + 1, device="cuda")
    bands = torch.minimum(n, torch.full_like(n, 256))
    if len(maskers) == 2:
        return bands
    return bands + torch.minimum(n - bands, resolve_budget(maskers[2]["heavy_size"], n))


def check(name: str, maskers: list, length: int) -> None:
    """Exit with a message unless the kernel selects and computes what the definition says."""
    small = call_of(maskers, 3000, 4, 2, seed=1)
    assert why_not(small) == "", why_not(small)
    out, wanted = prefill(small), run(small)[0]
    error = (out.float() - wanted.float()).norm() / wanted.float().norm()
    if not error < 1e-2:
        sys.exit(f"{name}: relative error {error:.2e} against the reference at 3,000")
    call = call_of(maskers, length)
    counts = torch.full((1, HEADS, length), -1, dtype=torch.int32, device="cuda")
    out = prefill(call, counts)
    wrong = int((counts != expected_counts(maskers, length)).sum())
    if wrong:
        sys.exit(f"{name}: {wrong} of {counts.numel()} rows have another number of keys than their budget")
    if not torch.equal(out, prefill(call)):
        sys.exit(f"{name}: two runs differ")
    for row in torch.linspace(0, length - 1, 9).long().tolist():
        worst = float((out[0, row] - exact_row(call, maskers, row)).abs().max())
        if not worst < 3e-2:
            sys.exit(f"{name}: row {row} differs from float64 by {worst:.2e}")


def exact_row(call: Call, maskers: list, row: int) -> torch.Tensor:
    """Float64 attention of one query position, ``[H, Dv]``, with the selection made in float64."""
    keys, values = (x[0, :, : row + 1].double().repeat_interleave(HEADS // GROUPS, 0) for x in (call.keys, call.values))
    scores = torch.einsum("hd,hkd->hk", call.queries[0, :, row].double(), keys) * call.context.scaling
    position = torch.arange(row + 1, device="cuda")
    active = ((position < 128) | (position > row - 128)).expand_as(scores)
    if len(maskers) > 2:
        budget = max(1, int((row + 1) * maskers[2]["heavy_size"]))
        open_scores = scores.masked_fill(active, -torch.inf)
        best = open_scores.topk(min(budget, row + 1), dim=-1).indices
        active = active | torch.zeros_like(active).scatter(-1, best, True)
    weights = scores.masked_fill(~active, -torch.inf).softmax(-1)
    return torch.einsum("hk,hkd->hd", weights, values).float()


def milliseconds(run_once: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """p20, p50, p80 by CUDA events."""
    run_once()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run_once()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    cuts = statistics.quantiles(times, n=5) if len(times) > 1 else times * 4
    return cuts[0], statistics.median(times), cuts[3]


def extra_mib(call: Call) -> float:
    """Peak memory of one call beyond inputs and output."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = prefill(call)
    peak = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    return peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lengths", nargs="*", type=int, default=[8192, 32768])
    lengths = parser.parse_args().lengths
    device = torch.cuda.get_device_name()
    rows = []
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}; bf16, H={HEADS}, G={GROUPS}, D={DIM}")
    print(f"{'Q = K':>8}  {'stack':26} {'ms':>9} {'dense ms':>9} {'of dense':>9} {'extra MiB':>10}")
    for length in lengths:
        repeats = max(2, min(20, 400_000 // length))
        dense = {}
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            call = call_of([], length)
            with sdpa_kernel(backend):
                dense[backend.name] = milliseconds(
                    lambda c=call: scaled_dot_product_attention(
                        c.queries, c.keys, c.values, is_causal=True, enable_gqa=True
                    ),
                    repeats,
                )
        best = min(times[1] for times in dense.values())
        for name, maskers in STACKS.items():
            check(name, maskers, length)
            call = call_of(maskers, length)
            times = milliseconds(lambda c=call: prefill(c), repeats)
            extra = extra_mib(call)
            ratio = times[1] / best
            print(f"{length:8,}  {name:26} {times[1]:9.2f} {best:9.2f} {ratio:8.3f}x {extra:10.0f}", flush=True)
            row = {"length": length, "stack": name, "ms": times, "dense_ms": dense, "ratio": ratio}
            rows.append({**row, "extra_mib": extra})
    print(json.dumps({"device": device, "torch": torch.__version__, "triton": triton.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
