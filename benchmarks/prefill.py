"""Prefill on a GPU: `python -m benchmarks.prefill [lengths] [--stages]`, exact sparse stacks against dense SDPA.

Before anything is timed every case is checked: on a small shape against the reference, and at the timed shape every
row's number of keys against its budget and the output of some rows against float64 (of top-p their keys too). A failed
check ends the run.
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
from sah_transformers.kernels.select.reference import top_p_thresholds
from sah_transformers.maskers import MaskerRegistry

SINK, LOCAL = {"type": "sink", "sink_size": 128}, {"type": "local", "window_size": 128}
STACKS = {
    "sink + local": [SINK, LOCAL],
    "sink + local + top-k 5 %": [SINK, LOCAL, {"type": "oracle_top_k", "heavy_size": 0.05}],
    "sink + local + top-p 0.9": [SINK, LOCAL, {"type": "oracle_top_p", "top_p": 0.9}],
}
HEADS, GROUPS, DIM = 32, 8, 128


def call_of(
    maskers: list, length: int, heads: int = HEADS, groups: int = GROUPS, seed: int = 0, batch: int = 1, hidden: int = 0
) -> Call:
    """Normal data; ``hidden`` keys of the left are padding, all sequences alike."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = ((batch, heads, length, DIM), (batch, groups, length, DIM), (batch, groups, length, DIM))
    tensors = [torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16) for s in shapes]
    mask = (torch.arange(length, device="cuda") >= hidden).expand(batch, -1) if hidden else None
    return make_call(*tensors, [MaskerRegistry.create_masker(m) for m in maskers], attention_mask=mask)


def expected_counts(maskers: list, length: int) -> torch.Tensor:
    """Keys of each row, ``[Q]``, from the budgets alone."""
    n = torch.arange(1, length + 1, device="cuda")
    bands = torch.minimum(n, torch.full_like(n, 256))
    if len(maskers) == 2:
        return bands
    assert "heavy_size" in maskers[2]
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
    is_mass = "top_p" in maskers[-1]
    wrong = 0 if is_mass else int((counts != expected_counts(maskers, length)).sum())
    if wrong:
        sys.exit(f"{name}: {wrong} of {counts.numel()} rows have another number of keys than their budget")
    if not torch.equal(out, prefill(call)):
        sys.exit(f"{name}: two runs differ")
    for row in torch.linspace(0, length - 1, 9).long().tolist():
        exact, active = exact_row(call, maskers, row)
        worst = float((out[0, row] - exact).abs().max())
        if not worst < 3e-2:
            sys.exit(f"{name}: row {row} differs from float64 by {worst:.2e}")
        off = int((counts[0, :, row] - active.sum(-1)).abs().max())
        if off > int(is_mass):  # a share of the mass may be a near-tie
            sys.exit(f"{name}: row {row} has {off} keys more or fewer than in float64")


def exact_row(call: Call, maskers: list, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 attention of one query position, ``[H, Dv]``, and its keys, ``[H, row + 1]``, selected in float64."""
    keys, values = (x[0, :, : row + 1].double().repeat_interleave(HEADS // GROUPS, 0) for x in (call.keys, call.values))
    scores = torch.einsum("hd,hkd->hk", call.queries[0, :, row].double(), keys) * call.context.scaling
    position = torch.arange(row + 1, device="cuda")
    active = ((position < 128) | (position > row - 128)).expand_as(scores)
    open_scores = scores.masked_fill(active, -torch.inf)
    if "heavy_size" in maskers[-1]:
        budget = max(1, int((row + 1) * maskers[-1]["heavy_size"]))
        best = open_scores.topk(min(budget, row + 1), dim=-1).indices
        active = active | torch.zeros_like(active).scatter(-1, best, True)
    elif "top_p" in maskers[-1] and not bool(active.all()):
        mass = open_scores.softmax(-1)
        active = active | (mass >= top_p_thresholds(mass, maskers[-1]["top_p"])) & (mass > 0)
    weights = scores.masked_fill(~active, -torch.inf).softmax(-1)
    return torch.einsum("hk,hkd->hd", weights, values).float(), active


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


def stages(call: Call, repeats: int = 3) -> dict[str, float]:
    """Milliseconds that one call spends in each kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            prefill(call)
        torch.cuda.synchronize()
    spent = {event.key: event.device_time_total / 1000 / repeats for event in profile.key_averages()}
    return {name: round(ms, 3) for name, ms in spent.items() if name.endswith("_kernel")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lengths", nargs="*", type=int, default=[8192, 32768])
    parser.add_argument("--stages", action="store_true", help="the time of each kernel, and of a left-padded batch")
    options = parser.parse_args()
    lengths = options.lengths
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
            if options.stages:
                print("         ", stages(call))
                padded = call_of(maskers, length, hidden=length // 4)
                print(f"          a quarter of it padding: {milliseconds(lambda c=padded: prefill(c), 3)[1]:.2f} ms")
    print(json.dumps({"device": device, "torch": torch.__version__, "triton": triton.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
