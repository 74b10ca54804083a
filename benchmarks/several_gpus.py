"""A decode step over several GPUs (tensor parallel), beside one: do the tokens agree, and what is a step's time?

python -m benchmarks.several_gpus [ranks] [cached tokens] [batch] [layers]

Sizes as Llama-3.1-8B with random weights; on a CPU a tiny model and gloo. The weights are saved once, into a temporary
folder (TMPDIR chooses where; 16 GB), from which every rank loads its share. The cache holds random keys.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import sah_transformers
from benchmarks.report import publish
from sah_transformers.bench.step import GROWING, Way, measured, model_of
from sah_transformers.bench.suites import Case

WINDOWS = [{"type": "sink", "sink_size": 128}, {"type": "local", "window_size": 128}]
STACKS: dict[str, list[dict[str, Any]]] = {
    "quest 5 % per KV head": [*WINDOWS, {"type": "quest", "heavy_size": 0.05, "gqa": "group"}],
    "top-k 5 % per KV head": [*WINDOWS, {"type": "oracle_top_k", "heavy_size": 0.05, "gqa": "group"}],
    "dense": [],
}
LARGE = (14336, 128256, 32, 8, 128, "bfloat16")
SMALL = (64, 64, 4, 2, 16, "float32")
"""Intermediate size, vocabulary, H, G, D, dtype."""


def sizes() -> tuple[Any, ...]:
    return LARGE if torch.cuda.is_available() else SMALL


def worker(folder: Path, cached: int, batch: int) -> None:
    """One rank: measure every stack, write what was found."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _, _, heads, groups, dim, dtype = sizes()
    device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    how: dict[str, Any] = {"tp_plan": "auto"} if ranks > 1 else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **how)
    if ranks == 1:
        model = model.to(device)
    share = slice(rank * groups // ranks, (rank + 1) * groups // ranks)
    maskers = (sah_transformers.CausalMaskerConfig(),)  # a case has some; the model's are the ones below
    case = Case(suite="", name="", K=cached, B=batch, H=heads, G=groups, D=dim, maskers=maskers)
    found = {}
    for name, stack in STACKS.items():
        if stack:
            sah_transformers.enable(model, stack)
        step = measured(case, model, Way(bool(stack), GROWING), share)
        found[name] = {**step.to_dict(), "tokens": step.tokens}
        print(f"rank {rank} of {ranks}, {name}: {step.wall_ms:.2f} ms", flush=True)
        if stack:
            sah_transformers.disable(model)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    (folder / f"{rank}of{ranks}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(folder: Path, ranks: int, cached: int, batch: int) -> list[dict[str, Any]]:
    """What each of so many ranks found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "benchmarks.several_gpus", "--worker", str(folder), str(cached), str(batch)]
    subprocess.run(command, check=True)
    return [json.loads((folder / f"{rank}of{ranks}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    if "--worker" in sys.argv:
        folder, cached, batch = sys.argv[sys.argv.index("--worker") + 1 :]
        return worker(Path(folder), int(cached), int(batch))
    given = [int(argument) for argument in sys.argv[1:]]
    ranks, cached, batch, layers = [*given, *(2, 131_072, 4, 32)[len(given) :]]
    intermediate, vocab, heads, groups, dim, dtype = sizes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = model_of(layers, heads * dim, intermediate, vocab, heads, groups, dim, dtype, device)
        model.save_pretrained(folder)
        model_of.cache_clear()
        del model
        if device == "cuda":
            torch.cuda.empty_cache()
        (one,) = launch(folder, 1, cached, batch)
        several = launch(folder, ranks, cached, batch)
    rows, data = [], {}
    for stack, alone in one.items():
        together = [rank[stack] for rank in several]
        between = all(step["tokens"] == together[0]["tokens"] for step in together)
        same = sum(a == b for a, b in zip(alone["tokens"], together[0]["tokens"], strict=True))
        wall = max(step["wall_ms"] for step in together)
        data[stack] = {
            "ranks_agree": between, "tokens_as_alone": same, "tokens": len(alone["tokens"]),
            "alone_ms": alone["wall_ms"], "wall_ms": wall, "alone_gpu_ms": alone["gpu_ms"],
            "gpu_ms": max(step["gpu_ms"] for step in together),
            "share_of_ideal": round(alone["wall_ms"] / (ranks * wall), 3),
        }  # fmt: skip
        found = data[stack]
        rows.append([
            stack, f"{alone['wall_ms']:.2f}", f"{wall:.2f}", f"{found['alone_gpu_ms']:.2f}", f"{found['gpu_ms']:.2f}",
            f"{found['share_of_ideal']:.2f}", "yes" if between else "NO", f"{same} of {len(alone['tokens'])}",
        ])  # fmt: skip
    columns = ["stack", "wall, 1 (ms)", f"wall, {ranks}", "device, 1", f"device, {ranks}", "of ideal", "ranks agree"]
    columns.append("tokens as alone")
    shape = {"ranks": ranks, "cached": cached, "batch": batch, "layers": layers}
    publish(f"a decode step on {ranks} devices", columns, rows, {**shape, "stacks": data})


if __name__ == "__main__":
    main()
