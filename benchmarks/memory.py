"""Memory and time of one attention call over Q = K keys, sparse and dense, each case in a process of its own.

python -m benchmarks.memory [longest]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.report import publish, quantiles
from sah_transformers import sparse_attention

BATCH, HEADS, KV_HEADS, DIM = 1, 8, 2, 64
LENGTHS = (2048, 4096, 8192, 16384)
STACK: list[dict[str, Any]] = [
    {"type": "sink", "sink_size": 128},
    {"type": "local", "window_size": 128},
    {"type": "oracle_top_k", "heavy_size": 0.05},
]
RUNS, SECONDS = 5, 60.0
"""A case stops after this many runs or seconds, whichever comes first."""


def inputs(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q ``[B, H, Q, D]``, k and v ``[B, G, K, D]``, float32."""
    torch.manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (torch.randn(BATCH, h, length, DIM) for h in heads)
    return q, k, v


def sparse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, stack: list[dict[str, Any]] = STACK) -> torch.Tensor:
    return sparse_attention(q, k, v, stack, return_mask=False)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def check() -> None:
    """Nothing is reported unless a budget of every key gives dense attention.

    Raises:
        RuntimeError: when it does not.
    """
    q, k, v = inputs(512)
    error = (sparse(q, k, v, [{"type": "oracle_top_k", "heavy_size": 1.0}]) - dense(q, k, v)).abs().max().item()
    if not error < 1e-5:
        raise RuntimeError(f"sparse_attention over all keys differs from dense attention by {error}")


def resident_mib(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (the most so far) of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def run_case(kind: str, length: int) -> dict[str, Any]:
    """Peak memory above the inputs of the first call, and times of all calls."""
    attend = {"sparse": sparse, "dense": dense}[kind]
    attend(*inputs(256))  # libraries load and threads start
    q, k, v = inputs(length)
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets VmHWM
    seconds: list[float] = []
    while len(seconds) < RUNS and sum(seconds) < SECONDS:
        start = time.perf_counter()
        attend(q, k, v)
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            peak = resident_mib("VmHWM") - before
    return {"kind": kind, "keys": length, "peak_mib": round(peak, 1), "runs": len(seconds), **quantiles(seconds, "s")}


def main() -> None:
    longest = int(sys.argv[1]) if len(sys.argv) > 1 else max(LENGTHS)
    check()
    cases, rows = [], []
    for length in (one for one in LENGTHS if one <= longest):
        pair = []
        for kind in ("sparse", "dense"):
            command = [sys.executable, "-m", "benchmarks.memory", "--case", kind, str(length)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            pair.append(json.loads(done.stdout.splitlines()[-1]))
        a, b = pair
        cases += pair
        memory = [a["peak_mib"], b["peak_mib"], 4 * BATCH * HEADS * length**2 / 2**20]
        seconds = [f"{a['p50_s']:.2f}", f"{b['p50_s']:.3f}", f"{a['p50_s'] / b['p50_s']:.0f}x", str(a["runs"])]
        rows.append([f"{length:,}", *(f"{mib:,.0f}" for mib in memory), *seconds])
        print(f"{length:,} done", file=sys.stderr)
    columns = ["Q = K", "sparse MiB", "dense MiB", "(all scores MiB)", "sparse s", "dense s", "ratio", "runs"]
    shapes = {"B": BATCH, "H": HEADS, "G": KV_HEADS, "D": DIM, "dtype": "float32", "stack": STACK}
    publish("memory and time of one attention call", columns, rows, {**shapes, "cases": cases})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        print(json.dumps(run_case(sys.argv[2], int(sys.argv[3]))))
    else:
        main()
