"""One decode step of a real model, whole, with a long cache: sparse against dense ``sdpa``, interleaved.

python -m benchmarks.decode_step [cached tokens]
"""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

import torch
from transformers import DynamicCache

import sah_transformers
from benchmarks.memory import STACK
from benchmarks.report import publish, quantiles
from sah_transformers.cli.demo import FILLER
from sah_transformers.cli.models import load

STEPS, WARM_UP = 30, 3


def twin(model: Any) -> Any:
    """A copy with a configuration of its own and the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def step(model: Any, token: torch.Tensor, cache: Any) -> tuple[float, torch.Tensor]:
    """(seconds, logits) of one step; the cache is left as it was."""
    start = time.perf_counter()
    logits = model(token, past_key_values=cache).logits
    seconds = time.perf_counter() - start
    cache.crop(-1)
    return seconds, logits


@torch.no_grad()
def main() -> None:
    cached = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    dense, tokenizer = load("smollm2")
    tokens = tokenizer(" ".join([FILLER] * (cached // 16)), return_tensors="pt")["input_ids"][:, : cached + 1]
    cache = DynamicCache(config=dense.config)
    for part in tokens[:, :cached].split(512, dim=1):
        dense(part, past_key_values=cache, logits_to_keep=1)
    token = tokens[:, cached:]

    sparse = twin(dense)
    sah_transformers.enable(sparse, [{"type": "causal"}])
    error = (step(sparse, token, cache)[1] - step(dense, token, cache)[1]).abs().max().item()
    if not error < 1e-2:  # logits of a 30-layer float32 model
        raise RuntimeError(f"a stack that selects every key differs from dense attention by {error}")
    sah_transformers.enable(sparse, STACK)
    with sah_transformers.record(sparse) as log:
        step(sparse, token, cache)

    seconds: dict[str, list[float]] = {"sparse": [], "dense": []}
    for i in range(WARM_UP + STEPS):
        for name, model in (("sparse", sparse), ("dense", dense)):
            taken = step(model, token, cache)[0]
            if i >= WARM_UP:
                seconds[name].append(taken * 1e3)
    cases = {name: quantiles(samples, "ms") for name, samples in seconds.items()}
    ratio = cases["sparse"]["p50_ms"] / cases["dense"]["p50_ms"]
    rows = [[name, *(f"{value:.1f}" for value in case.values())] for name, case in cases.items()]
    rows[0] += [f"{ratio:.2f}x", f"{log.mean('density'):.3f}", f"{log.mean('recall'):.4f}"]
    columns = ["step", "p20 ms", "p50 ms", "p80 ms", "ratio to dense", "density", "recall"]
    data = {"model": "SmolLM2-135M-Instruct", "cached": cached, "dtype": "float32", "stack": STACK, "steps": STEPS}
    publish("one decode step of a whole model", columns, rows, {**data, **cases, "ratio": round(ratio, 3)})


if __name__ == "__main__":
    main()
