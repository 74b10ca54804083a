"""A decode step over several GPUs (tensor parallel), beside one: do the tokens agree, and what is a step's time?

python -m benchmarks.several_gpus [ranks] [cached tokens] [batch] [layers] [dtype]

Sizes as Llama-3.1-8B with random weights; on a CPU a tiny model and gloo. The weights are saved once, into a temporary
folder (TMPDIR chooses where; 16 GB), from which every rank loads its share. The cache holds random keys. Sparse steps
are replayed as CUDA graphs, dense ones run as Transformers' own. Several devices add in another order than one: where
their tokens differ first, it is told how far apart the two logits are, and how far those of one device and of several.
In float32 (at 32,768 tokens, two sequences, say, or with a few layers) there is hardly a tie that this decides.
Where there are fewer GPUs than ranks these share them through gloo, uncaptured: then tokens say something, times
nothing.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import sah_transformers
from benchmarks.report import publish
from sah_transformers.bench.step import GROWING, REPLAYED, Way, filled, generate, measured, model_of
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

TOKENS, BEST = 28, 8
"""Tokens that are compared, and how many of the largest logits of each are kept."""


def sizes() -> tuple[Any, ...]:
    return LARGE if torch.cuda.is_available() else SMALL


def worker(folder: Path, cached: int, batch: int, dtype: str) -> None:
    """One rank: measure every stack, write what was found."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _, _, heads, groups, dim, _ = sizes()
    device, shared = "cpu", False
    if torch.cuda.is_available():
        devices = torch.cuda.device_count()
        shared, place = devices < ranks, rank % devices
        device = f"cuda:{place}"
        torch.cuda.set_device(place)
        if shared:
            share_gpus(place)
    how: dict[str, Any] = {"tp_plan": "auto"} if ranks > 1 else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **how)
    if ranks == 1:
        model = model.to(device)
    share = slice(rank * groups // ranks, (rank + 1) * groups // ranks)
    maskers = (sah_transformers.CausalMaskerConfig(),)  # a case has some; the model's are the ones below
    case = Case(suite="", name="", K=cached, B=batch, H=heads, G=groups, D=dim, maskers=maskers, dtype=dtype)
    found = {}
    for name, stack in STACKS.items():
        if stack:
            sah_transformers.enable(model, stack)
        way = Way(True, REPLAYED) if stack and not shared else Way(bool(stack), GROWING)
        step = measured(case, model, way, share)
        free(device)
        best = best_logits(case, model, way, share)
        found[name] = {**step.to_dict(), "tokens": best["ids"][:, :, 0].tolist()}
        found[name] |= {"best": {part: tensor.tolist() for part, tensor in best.items()}}
        print(f"rank {rank} of {ranks}, {name}: {step.wall_ms:.2f} ms", flush=True)
        if stack:
            sah_transformers.disable(model)
        free(device)
    (folder / f"{rank}of{ranks}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def share_gpus(place: int) -> None:
    """Connect ranks, this one on GPU ``place``, of which several have the same: NCCL refuses that, and gloo cannot be
    captured.

    PyTorch's gloo crashes where it gathers tensors of a GPU into one (pytorch/pytorch#152645): that goes by the host.
    """
    os.environ["LOCAL_RANK"] = str(place)
    torch.distributed.init_process_group("gloo")

    def gather(given: torch.Tensor, size: int, name: str) -> torch.Tensor:
        here = given.cpu().contiguous()
        parts = [torch.empty_like(here) for _ in range(size)]
        torch.distributed.all_gather(parts, here)
        return torch.cat(parts).to(given.device)

    _gathering.impl("all_gather_into_tensor", gather, "CUDA")


_gathering = torch.library.Library("_c10d_functional", "IMPL")


def free(device: str) -> None:
    """Have the caches of earlier steps gone."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def best_logits(case: Case, model: Any, way: Way, share: slice) -> dict[str, torch.Tensor]:
    """The largest logits of each new token, and whose they are: ``[B, TOKENS, BEST]``."""
    cache = filled(case, model, way, case.K + TOKENS, share)
    options = {"return_dict_in_generate": True, "output_logits": True}
    logits = torch.stack(generate(case, model, cache, way, TOKENS, **options).logits, dim=1)
    values, ids = logits.float().topk(BEST)
    return {"values": values.cpu(), "ids": ids.cpu()}


def first_differences(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[float, float]]:
    """Of each sequence whose tokens differ: (how far apart the two tokens' logits are on one device where they first
    do, how far logits of the same tokens are apart between one device and several until then)."""
    found = []
    for values, ids, others, other_ids in zip(
        *(one["best"][part] for part in ("values", "ids")), *(other["best"][part] for part in ("values", "ids")),
        strict=True,
    ):  # fmt: skip
        off = 0.0
        for logits, tokens, their, their_tokens in zip(values, ids, others, other_ids, strict=True):
            here, there = dict(zip(tokens, logits, strict=True)), dict(zip(their_tokens, their, strict=True))
            off = max([off, *(abs(here[token] - there[token]) for token in here.keys() & there.keys())])
            if tokens[0] != their_tokens[0]:
                found.append((logits[0] - here.get(their_tokens[0], logits[-1]), off))
                break
    return found


def launch(folder: Path, ranks: int, cached: int, batch: int, dtype: str) -> list[dict[str, Any]]:
    """What each of so many ranks found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "benchmarks.several_gpus", "--worker", str(folder), str(cached), str(batch), dtype]
    subprocess.run(command, check=True)
    return [json.loads((folder / f"{rank}of{ranks}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    if "--worker" in sys.argv:
        folder, cached, batch, dtype = sys.argv[sys.argv.index("--worker") + 1 :]
        return worker(Path(folder), int(cached), int(batch), dtype)
    intermediate, vocab, heads, groups, dim, usual = sizes()
    given = sys.argv[1:]
    *numbers, dtype = [*given, *("2", "131072", "4", "32", usual)[len(given) :]]
    ranks, cached, batch, layers = map(int, numbers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = model_of(layers, heads * dim, intermediate, vocab, heads, groups, dim, dtype, device)
        model.save_pretrained(folder)
        model_of.cache_clear()
        del model
        if device == "cuda":
            torch.cuda.empty_cache()
        (one,) = launch(folder, 1, cached, batch, dtype)
        several = launch(folder, ranks, cached, batch, dtype)
    rows, data = [], {}
    for stack, alone in one.items():
        together = [rank[stack] for rank in several]
        between = all(step["tokens"] == together[0]["tokens"] for step in together)
        pairs = list(zip(*(chain.from_iterable(step["tokens"]) for step in (alone, together[0])), strict=True))
        same = sum(a == b for a, b in pairs)
        differences = first_differences(alone, together[0])
        wall = max(step["wall_ms"] for step in together)
        data[stack] = {
            "ranks_agree": between, "tokens_as_alone": same, "tokens": len(pairs),
            "first_differences": differences,
            "alone_ms": alone["wall_ms"], "wall_ms": wall, "alone_gpu_ms": alone["gpu_ms"],
            "gpu_ms": max(step["gpu_ms"] for step in together),
            "share_of_ideal": round(alone["wall_ms"] / (ranks * wall), 3),
        }  # fmt: skip
        found = data[stack]
        rows.append([
            stack, f"{alone['wall_ms']:.2f}", f"{wall:.2f}", f"{found['alone_gpu_ms']:.2f}", f"{found['gpu_ms']:.2f}",
            f"{found['share_of_ideal']:.2f}", "yes" if between else "NO", f"{same} of {len(pairs)}",
            "; ".join(f"{gap:.3g} ({off:.3g})" for gap, off in differences) or "none",
        ])  # fmt: skip
    columns = ["stack", "wall, 1 (ms)", f"wall, {ranks}", "device, 1", f"device, {ranks}", "of ideal", "ranks agree"]
    columns += ["tokens as alone", "first differences: logits apart (1 or several)"]
    shape = {"ranks": ranks, "cached": cached, "batch": batch, "layers": layers, "dtype": dtype}
    publish(f"a decode step on {ranks} devices", columns, rows, {**shape, "stacks": data})


if __name__ == "__main__":
    main()
